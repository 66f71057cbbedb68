// The account database: the users, and the sessions when there is no Redis, in one SQLite file.

package main

import (
	"context"
	"crypto/sha256"
	"database/sql"
	_ "embed"
	"errors"
	"fmt"
	"math"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

var (
	errUserNotFound = errors.New("no such user")
	errEmailTaken   = errors.New("the email is registered already")
)

// A write ends after writeTimeout, except a commit that has begun: that lasts as long as the disk needs.
// For some 1.5 s of it (busy_timeout) SQLite waits for other processes' locks.
const writeTimeout = 2500 * time.Millisecond

//go:embed schema.sql
var schema string

// database is the SQLite file. The original program may use the same file at the same time.
type database struct {
	writer *sql.DB // one connection, as SQLite allows one writer
	reader *sql.DB // several, which in WAL mode never wait for the writer

	userByEmail      *sql.Stmt
	usersByEmailCase *sql.Stmt
	emailTaken       *sql.Stmt
	anyUser          *sql.Stmt
	insertUser       *sql.Stmt
	replaceHash      *sql.Stmt
	sessionByHash    *sql.Stmt
	insertSession    *sql.Stmt
	deleteSession    *sql.Stmt
	sweepSessions    *sql.Stmt
}

// openDatabase opens the file at path and applies the schema. A missing file is created, readable to its
// owner only. A file whose tables are another program's is left as it was, and the error names table and
// column.
func openDatabase(path string) (*database, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	file.Close()
	// The pragmas stand in the name so that every connection of a pool has them. synchronous(FULL): what
	// was committed must outlive a power cut. temp_store(MEMORY): a scratch image has no /tmp.
	escaped := (&url.URL{Path: filepath.ToSlash(filepath.Clean(path))}).EscapedPath()
	name := "file:" + escaped + "?_pragma=synchronous(FULL)&_pragma=foreign_keys(1)" +
		"&_pragma=temp_store(MEMORY)&_txlock=immediate"
	if err := setUp(path, name); err != nil {
		return nil, err
	}
	name += "&_pragma=busy_timeout(1500)&_pragma=journal_mode(WAL)"
	db := &database{}
	if db.writer, err = sql.Open("sqlite", name); err != nil {
		return nil, err
	}
	if db.reader, err = sql.Open("sqlite", name+"&_query_only=1"); err != nil {
		return nil, err
	}
	db.writer.SetMaxOpenConns(1)
	db.reader.SetMaxOpenConns(runtime.NumCPU() + 1)
	db.reader.SetMaxIdleConns(runtime.NumCPU() + 1)
	if err := db.prepare(); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return db, nil
}

// setUp checks whose tables the file has, applies the schema and makes the file a WAL database. A file of
// another program is left as it was. One that others are writing to is waited for.
func setUp(path, name string) error {
	if _, err := os.Stat(path + "-wal"); err == nil {
		if err := checkReadOnly(name); errors.Is(err, errForeignTable) {
			return err // other errors recur below
		}
	}
	db, err := sql.Open("sqlite", name+"&_pragma=busy_timeout(10000)")
	if err != nil {
		return err
	}
	defer db.Close()
	if err := tryOut(db); err != nil {
		return err
	}
	if _, err := db.Exec(schema); err != nil {
		return fmt.Errorf("applying the schema: %w", err)
	}
	// SQLite does not wait here, whatever its busy_timeout.
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		_, err := db.Exec(`PRAGMA journal_mode(WAL)`)
		if err == nil || !errors.Is(storeError("", err), errRefused) || time.Now().After(deadline) {
			return err
		}
	}
}

// checkReadOnly is checkTables without writing a write-ahead log back, which may be another program's.
func checkReadOnly(name string) error {
	db, err := sql.Open("sqlite", name+"&mode=ro")
	if err != nil {
		return err
	}
	defer db.Close()
	return checkTables(db)
}

// tryOut applies the schema and inserts an account, in a transaction that is rolled back: a file that
// refuses either stays as it was.
func tryOut(db *sql.DB) error {
	tx, err := db.Begin()
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if err := checkTables(tx); err != nil {
		return err
	}
	if _, err := tx.Exec(schema); err != nil {
		return fmt.Errorf("applying the schema: %w", err)
	}
	id := newUUID()
	_, err = tx.Exec(insertUser, id, "trial", id, 0, 0, "trial", id)
	if errors.Is(storeError("", err), errUnavailable) {
		return err // a full disk, say
	}
	if err != nil {
		return fmt.Errorf("table users is %w: it takes no account: %w", errForeignTable, err)
	}
	return nil
}

var errForeignTable = errors.New("another program's")

// querier is a *sql.DB or a *sql.Tx.
type querier interface {
	Query(query string, args ...any) (*sql.Rows, error)
}

func checkTables(q querier) error {
	err := checkTable(q, "users", "id", "name", "email", "password", "createdAt", "updateAt")
	if err != nil {
		return err
	}
	return checkTable(q, "sessions",
		"id_hash", "user_id", "name", "email", "created_at", "updated_at", "expires_at")
}

// checkTable returns errForeignTable unless the file has no such table, or one with these columns. Further
// columns are allowed if they have a default or may be NULL.
func checkTable(q querier, table string, columns ...string) error {
	rows, err := q.Query(`SELECT name, "notnull" AND dflt_value IS NULL FROM pragma_table_info(?)`, table)
	if err != nil {
		return err
	}
	defer rows.Close()
	missing := slices.Clone(columns)
	exists := false
	for rows.Next() {
		exists = true
		var column string
		var required bool
		if err := rows.Scan(&column, &required); err != nil {
			return err
		}
		if !slices.Contains(columns, column) && required {
			return fmt.Errorf("table %s is %w: it wants a column %q filled", table, errForeignTable, column)
		}
		missing = slices.DeleteFunc(missing, func(c string) bool { return c == column })
	}
	if err := rows.Err(); err != nil {
		return err
	}
	if exists && len(missing) > 0 {
		return fmt.Errorf("table %s is %w: it has no column %q", table, errForeignTable, missing[0])
	}
	return nil
}

// insertUser inserts nothing where the email is taken: as ?7, which is how it was typed, or as ?3.
const insertUser = `INSERT INTO users (id, name, email, createdAt, updateAt, password)
	SELECT ?1, ?2, ?3, ?4, ?5, ?6
	WHERE NOT EXISTS (SELECT 1 FROM users WHERE email COLLATE NOCASE IN (?3, ?7))`

// prepare prepares every statement, so that one that does not fit the file ends the start.
func (db *database) prepare() error {
	// A date that is NULL or cannot be read keeps nobody out (userTimes).
	const user = `SELECT id, name, email, COALESCE(CAST(createdAt AS TEXT), ''),
		COALESCE(CAST(updateAt AS TEXT), ''), password FROM users `
	for _, p := range []struct {
		stmt  **sql.Stmt
		pool  *sql.DB
		query string
	}{
		{&db.userByEmail, db.reader, user + `WHERE email = ?`},
		{&db.usersByEmailCase, db.reader, user + `WHERE email = ? COLLATE NOCASE LIMIT 2`},
		{&db.emailTaken, db.reader,
			`SELECT EXISTS (SELECT 1 FROM users WHERE email COLLATE NOCASE IN (?, ?))`},
		{&db.anyUser, db.reader, `SELECT EXISTS (SELECT 1 FROM users)`},
		{&db.insertUser, db.writer, insertUser},
		{&db.replaceHash, db.writer, `UPDATE users SET password = ? WHERE id = ? AND password = ?`},
		{&db.sessionByHash, db.reader, `SELECT user_id, name, email, created_at, updated_at
			FROM sessions WHERE id_hash = ? AND expires_at > ?`},
		{&db.insertSession, db.writer,
			`INSERT INTO sessions (id_hash, user_id, name, email, created_at, updated_at, expires_at)
			VALUES (?, ?, ?, ?, ?, ?, ?)`},
		{&db.deleteSession, db.writer, `DELETE FROM sessions WHERE id_hash = ? AND expires_at > ?`},
		{&db.sweepSessions, db.writer, `DELETE FROM sessions WHERE id_hash IN
			(SELECT id_hash FROM sessions WHERE expires_at <= ? LIMIT 100)`},
	} {
		var err error
		if *p.stmt, err = p.pool.Prepare(p.query); err != nil {
			return fmt.Errorf("preparing %s: %w", p.query, err)
		}
	}
	return nil
}

// Close closes the connections, the writer last: it folds the write-ahead log into the file.
func (db *database) Close() error {
	err := db.reader.Close()
	return errors.Join(err, db.writer.Close())
}

// Ping returns nil when the users table can be read.
func (db *database) Ping(ctx context.Context) error {
	return storeError("reading users", db.anyUser.QueryRowContext(ctx).Scan(new(bool)))
}

// EmailTaken returns errEmailTaken when an account has the email as it was typed, or trimmed, in any case of
// its ASCII letters.
func (db *database) EmailTaken(ctx context.Context, typed string) error {
	var taken bool
	err := db.emailTaken.QueryRowContext(ctx, typed, strings.TrimSpace(typed)).Scan(&taken)
	if err != nil {
		return storeError("looking an email up", err)
	}
	if taken {
		return errEmailTaken
	}
	return nil
}

// InsertUser stores a new account with its email as in user. It returns errEmailTaken as EmailTaken does, for
// the email as it was typed.
func (db *database) InsertUser(ctx context.Context, user User, typed, passwordHash string) error {
	createdAt, err := time.Parse(timeFormat, user.CreatedAt)
	if err != nil {
		return fmt.Errorf("inserting user: %w", err)
	}
	return db.write(ctx, "inserting user", func(ctx context.Context, tx *sql.Tx) error {
		millis := createdAt.UnixMilli() // as Prisma writes it
		result, err := tx.StmtContext(ctx, db.insertUser).
			ExecContext(ctx, user.ID, user.Name, user.Email, millis, millis, passwordHash, typed)
		if err != nil {
			return err
		}
		inserted, err := result.RowsAffected()
		if err == nil && inserted == 0 {
			return errEmailTaken
		}
		return err
	})
}

// UserByEmail returns the account that an email means at sign-in, and its password hash. That is, in this
// order: the one with the email as it was typed, byte for byte; the one with it trimmed; the only one that
// differs from that in the case of ASCII letters. Otherwise errUserNotFound.
func (db *database) UserByEmail(ctx context.Context, typed string) (User, string, error) {
	const doing = "finding user by email"
	for _, email := range []string{typed, strings.TrimSpace(typed)} {
		user, passwordHash, err := scanUser(db.userByEmail.QueryRowContext(ctx, email))
		if !errors.Is(err, sql.ErrNoRows) {
			return user, passwordHash, storeError(doing, err)
		}
	}
	rows, err := db.usersByEmailCase.QueryContext(ctx, strings.TrimSpace(typed))
	if err != nil {
		return User{}, "", storeError(doing, err)
	}
	defer rows.Close()
	var user User
	var passwordHash string
	found := 0
	for ; rows.Next(); found++ {
		if user, passwordHash, err = scanUser(rows); err != nil {
			return User{}, "", storeError(doing, err)
		}
	}
	if err := rows.Err(); err != nil {
		return User{}, "", storeError(doing, err)
	}
	if found != 1 {
		return User{}, "", errUserNotFound
	}
	return user, passwordHash, nil
}

// scanUser reads a row of users, from a *sql.Row or *sql.Rows.
func scanUser(row interface{ Scan(...any) error }) (user User, passwordHash string, err error) {
	var createdAt, updatedAt string
	err = row.Scan(&user.ID, &user.Name, &user.Email, &createdAt, &updatedAt, &passwordHash)
	if err != nil {
		return User{}, "", err
	}
	user.CreatedAt, user.UpdatedAt = userTimes(parseColumnTime, createdAt, updatedAt)
	return user, passwordHash, nil
}

// parseColumnTime reads a time of the users table, cast to text, as Prisma does: Unix milliseconds, a fraction
// of one cut off, or a date with or without a time. Where there is no zone it is UTC.
func parseColumnTime(text string) (string, bool) {
	if millis, err := strconv.ParseFloat(text, 64); err == nil && math.Abs(millis) < 1<<53 {
		return formatTime(time.UnixMilli(int64(millis)))
	}
	text = strings.Replace(text, " ", "T", 1)
	for _, layout := range []string{"2006-01-02T15:04:05", time.DateOnly} {
		if t, err := time.Parse(layout, text); err == nil {
			return formatTime(t)
		}
	}
	return parseRFC3339(text)
}

// ReplacePasswordHash replaces oldHash by newHash. It does nothing if the stored hash has changed.
func (db *database) ReplacePasswordHash(ctx context.Context, userID, oldHash, newHash string) error {
	return db.write(ctx, "replacing password hash", func(ctx context.Context, tx *sql.Tx) error {
		_, err := tx.StmtContext(ctx, db.replaceHash).ExecContext(ctx, newHash, userID, oldHash)
		return err
	})
}

// change is the body of a write transaction.
type change func(ctx context.Context, tx *sql.Tx) error

// write makes a change in one transaction. A client that hangs up does not cancel it; ctx's
// deadline does.
func (db *database) write(ctx context.Context, doing string, do change) error {
	deadline := time.Now().Add(writeTimeout)
	if earlier, ok := ctx.Deadline(); ok && earlier.Before(deadline) {
		deadline = earlier
	}
	ctx, cancel := context.WithDeadline(context.WithoutCancel(ctx), deadline)
	defer cancel()
	tx, err := db.writer.BeginTx(ctx, nil)
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%s: %w: other writes are in the way: %w", doing, errRefused, err)
	}
	if err != nil {
		return storeError(doing, err)
	}
	defer tx.Rollback()
	if err := do(ctx, tx); err != nil {
		return storeError(doing, err)
	}
	return storeError(doing, tx.Commit())
}

// storeError adds what failed, and maps the errors of database/sql and SQLite to this program's:
// errEmailTaken; errUnavailable where SQLite refused (errRefused), could not read or write, or was too slow.
// Any other is a fault of this program. The codes are https://www.sqlite.org/rescode.html.
func storeError(doing string, err error) error {
	if err == nil {
		return nil
	}
	e, isSQLite := errors.AsType[*sqlite.Error](err)
	switch {
	case isSQLite && e.Code() == sqlite3.SQLITE_CONSTRAINT_UNIQUE:
		err = errEmailTaken // users.email has the only such constraint
	case isSQLite:
		err = classify(e)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, sql.ErrTxDone):
		// The transaction was rolled back at its deadline.
		err = fmt.Errorf("%w: %w", errUnavailable, err)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// classify wraps an error of SQLite, by its primary code, as errRefused or errUnavailable, or returns it as
// it is.
func classify(err *sqlite.Error) error {
	switch err.Code() & 0xff {
	case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY,
		sqlite3.SQLITE_PERM:
		return fmt.Errorf("%w: %w", errRefused, err)
	case sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_MISUSE,
		sqlite3.SQLITE_RANGE:
		return err
	}
	// An input or output error, a file that is gone or no database.
	return fmt.Errorf("%w: %w", errUnavailable, err)
}

// sqliteSessions is the embedded session backend: rows beside the accounts, which outlive a restart.
type sqliteSessions struct {
	db *database
}

// Create sweeps a hundred expired sessions, too.
func (s *sqliteSessions) Create(ctx context.Context, id string, user User, ttl time.Duration) error {
	now := time.Now()
	return s.db.write(ctx, "creating session", func(ctx context.Context, tx *sql.Tx) error {
		if _, err := tx.StmtContext(ctx, s.db.sweepSessions).ExecContext(ctx, now.UnixMilli()); err != nil {
			return err
		}
		_, err := tx.StmtContext(ctx, s.db.insertSession).ExecContext(ctx, hashID(id),
			user.ID, user.Name, user.Email, user.CreatedAt, user.UpdatedAt, now.Add(ttl).UnixMilli())
		return err
	})
}

// Get ignores ctx: to watch it, database/sql and the driver would each start a goroutine, for a read of
// microseconds.
func (s *sqliteSessions) Get(_ context.Context, id string) (User, error) {
	var user User
	row := s.db.sessionByHash.QueryRow(hashID(id), time.Now().UnixMilli())
	err := row.Scan(&user.ID, &user.Name, &user.Email, &user.CreatedAt, &user.UpdatedAt)
	if errors.Is(err, sql.ErrNoRows) {
		return User{}, errNoSession
	}
	if err != nil {
		return User{}, storeError("looking a session up", err)
	}
	return user, nil
}

func (s *sqliteSessions) Delete(ctx context.Context, id string) error {
	return s.db.write(ctx, "deleting session", func(ctx context.Context, tx *sql.Tx) error {
		now := time.Now().UnixMilli()
		result, err := tx.StmtContext(ctx, s.db.deleteSession).ExecContext(ctx, hashID(id), now)
		if err != nil {
			return err
		}
		deleted, err := result.RowsAffected()
		if err == nil && deleted == 0 {
			return errNoSession
		}
		return err
	})
}

func (s *sqliteSessions) Ping(ctx context.Context) error { return s.db.Ping(ctx) }

// Close leaves the account database to whoever opened it.
func (s *sqliteSessions) Close() error { return nil }

func hashID(id string) []byte {
	sum := sha256.Sum256([]byte(id))
	return sum[:]
}
