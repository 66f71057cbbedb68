// The account database: the users, and the sessions when there is no Redis, in one SQLite file.

package main

import (
	"context"
	"crypto/sha256"
	"database/sql"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

var (
	errUserNotFound = errors.New("no such user")
	errEmailTaken   = errors.New("the email is registered already")
)

// How long operations may take. SQLite waits for other processes' locks for 1.5 s of it (busy_timeout).
const (
	setUpTimeout  = 10 * time.Second
	readerTimeout = time.Second             // the wait for a free reading connection
	writeTimeout  = 2500 * time.Millisecond // a write, but for a commit that has begun
)

//go:embed schema.sql
var schema string

// database is the SQLite file. The original program may use the same file at the same time.
type database struct {
	path     string
	opened   []openedFile  // the file, and its write-ahead log
	writer   *sql.DB       // one connection, as SQLite allows one writer
	reader   *sql.DB       // several, which in WAL mode never wait for the writer
	reading  chan struct{} // an element for each read in progress
	abandon  sync.Once
	lookedAt atomic.Int64          // when readSession last looked, Unix milliseconds
	gone     atomic.Pointer[error] // set once the file is not the one that was opened

	userByEmail      *sql.Stmt
	usersByEmailCase *sql.Stmt
	anyUser          *sql.Stmt
	insertUser       *sql.Stmt
	replaceHash      *sql.Stmt
	sessionByHash    *sql.Stmt
	anySession       *sql.Stmt
	insertSession    *sql.Stmt
	deleteSession    *sql.Stmt
	sweepSessions    *sql.Stmt
}

// openDatabase opens the file at path and applies the schema. A missing file is created, readable to its
// owner only. A file whose tables are another program's is left as it was, and the error names the table.
// When ctx ends, so does the wait for other programs' locks.
func openDatabase(ctx context.Context, path string) (*database, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, explain(path, err)
	}
	info, err := file.Stat()
	file.Close()
	if err != nil {
		return nil, err
	}
	target, err := filepath.EvalSymlinks(path) // the log stands beside it
	if err != nil {
		return nil, err
	}
	// The pragmas stand in the name so that every connection of a pool has them. synchronous(FULL): what
	// was committed must outlive a power cut. temp_store(MEMORY): a scratch image has no /tmp. _dqs=0: a
	// column that is missing must not be taken for a string.
	escaped := (&url.URL{Path: filepath.ToSlash(filepath.Clean(path))}).EscapedPath()
	name := "file:" + escaped + "?_pragma=synchronous(FULL)&_pragma=foreign_keys(1)" +
		"&_pragma=temp_store(MEMORY)&_txlock=immediate&_dqs=0"
	defer holdLog(target+"-wal", name)()
	if err := setUp(ctx, name); err != nil {
		return nil, explain(target, err)
	}
	db := &database{path: path, reading: make(chan struct{}, runtime.NumCPU()+1)}
	db.opened = []openedFile{{path, info}}
	name += "&_pragma=busy_timeout(1500)"
	if db.writer, err = openPool(name, 1); err != nil {
		return nil, err
	}
	if db.reader, err = openPool(name+"&_query_only=1", cap(db.reading)); err != nil {
		db.writer.Close()
		return nil, err
	}
	if err := db.open(target + "-wal"); err != nil {
		db.Close()
		return nil, explain(target, err)
	}
	return db, nil
}

// openedFile is a file as it was when it was opened.
type openedFile struct {
	path string
	info os.FileInfo
}

// open opens all connections and prepares all statements. One that was opened later, when another file stands
// at the path, would read that file through the write-ahead log of the first.
func (db *database) open(log string) error {
	if err := db.prepare(); err != nil {
		return err
	}
	info, err := os.Stat(log)
	if err != nil {
		return err
	}
	db.opened = append(db.opened, openedFile{log, info})
	for range cap(db.reading) {
		conn, err := db.reader.Conn(context.Background())
		if err != nil {
			return err
		}
		defer conn.Close()
		row := conn.QueryRowContext(context.Background(), anyUser) // opens the log
		if err := row.Scan(new(bool)); err != nil {
			return err
		}
	}
	return db.outcome("opening", nil)
}

// openPool returns a pool that keeps its connections, once they are open.
func openPool(name string, connections int) (*sql.DB, error) {
	pool, err := sql.Open("sqlite", name)
	if err != nil {
		return nil, err
	}
	pool.SetMaxOpenConns(connections)
	pool.SetMaxIdleConns(connections)
	return pool, nil
}

// holdLog keeps the write-ahead log of a file that is not ours as it is. The last connection to close folds
// the log into the file, unless it is one that cannot write. So such a one stays open until release.
func holdLog(log, name string) (release func()) {
	if _, err := os.Stat(log); err != nil {
		return func() {}
	}
	db, err := sql.Open("sqlite", name+"&mode=ro")
	if err != nil {
		return func() {}
	}
	db.Exec(`SELECT count(*) FROM sqlite_schema`) // opens the log; an error recurs in setUp
	return func() { db.Close() }
}

// explain adds to an error that the file's folder cannot be written, if so. SQLite says no more than "unable
// to open database file".
func explain(path string, err error) error {
	folder := filepath.Dir(path)
	probe, probeErr := os.CreateTemp(folder, "")
	if probeErr == nil {
		probe.Close()
		os.Remove(probe.Name())
	}
	if probeErr == nil || errors.Is(probeErr, fs.ErrNotExist) {
		return err
	}
	return fmt.Errorf("%w; the folder %q must be writable, for files beside it that end in -wal and -shm: %w",
		err, folder, probeErr)
}

// setUp applies the schema and switches to a write-ahead log, when no other process holds a lock. Its own
// connection waits for locks for short times, to look at ctx in between.
func setUp(ctx context.Context, name string) error {
	db, err := openPool(name+"&_pragma=busy_timeout(100)", 1)
	if err != nil {
		return err
	}
	defer db.Close()
	if err := whenFree(ctx, func() error { return applySchema(db) }); err != nil {
		return err
	}
	err = whenFree(ctx, func() error { // SQLite does not wait here by itself
		_, err := db.Exec(`PRAGMA journal_mode(WAL)`)
		return err
	})
	if err != nil {
		return fmt.Errorf("switching to a write-ahead log: %w", err)
	}
	return nil
}

// whenFree repeats what other processes' locks keep from being done.
func whenFree(ctx context.Context, do func() error) error {
	for deadline := time.Now().Add(setUpTimeout); ; time.Sleep(20 * time.Millisecond) {
		err := do()
		e, ok := errors.AsType[*sqlite.Error](err)
		if !ok || e.Code()&0xff != sqlite3.SQLITE_BUSY || time.Now().After(deadline) {
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// applySchema applies the schema and tries it out with an account and a session, in one transaction. What
// does not take them is another program's, and stays as it was.
func applySchema(db *sql.DB) error {
	tx, err := db.Begin()
	if err != nil {
		return err
	}
	defer tx.Rollback()
	script, err := schemaFor(tx)
	if err != nil {
		return err
	}
	if _, err := tx.Exec(script); err != nil {
		return setUpError("applying the schema to the tables users and sessions", err)
	}
	if _, err := tx.Exec(`SAVEPOINT trial`); err != nil {
		return err
	}
	id := newUUID()
	if _, err := tx.Exec(insertUser, id, "trial", id, 0, 0, "trial", id); err != nil {
		return setUpError("adding a trial account to the table users", err)
	}
	if _, err := tx.Exec(insertSession, hashID(id), id, "trial", id, "", "", 0); err != nil {
		return setUpError("adding a trial session to the table sessions", err)
	}
	if _, err := tx.Exec(`ROLLBACK TO trial`); err != nil {
		return err
	}
	return tx.Commit()
}

// schemaFor returns the schema, and for a file of an earlier version also what copies its sessions to a table
// that is not STRICT: SQLite before 3.37 reads no file that has a STRICT one.
func schemaFor(tx *sql.Tx) (script string, err error) {
	var strict bool
	row := tx.QueryRow(`SELECT EXISTS (SELECT 1 FROM pragma_table_list
		WHERE schema = 'main' AND name = 'sessions' AND strict)`)
	if err := row.Scan(&strict); err != nil || !strict {
		return schema, err
	}
	return `ALTER TABLE sessions RENAME TO strict_sessions;
		DROP INDEX IF EXISTS sessions_expires_at;` + schema + `
		INSERT INTO sessions SELECT * FROM strict_sessions;
		DROP TABLE strict_sessions;`, nil
}

// setUpError says that the file is another program's if its tables are the trouble, and not a full disk.
func setUpError(doing string, err error) error {
	if e, ok := errors.AsType[*sqlite.Error](err); ok {
		switch e.Code() & 0xff {
		case sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH:
			return fmt.Errorf("%s: the file is another program's: %w", doing, err)
		}
	}
	return fmt.Errorf("%s: %w", doing, err)
}

const (
	anyUser = `SELECT EXISTS (SELECT 1 FROM users)`

	// It inserts nothing where the email is taken: as ?7, which is how it was typed, or as ?3.
	insertUser = `INSERT INTO users (id, name, email, createdAt, updateAt, password)
		SELECT ?1, ?2, ?3, ?4, ?5, ?6
		WHERE NOT EXISTS (SELECT 1 FROM users WHERE email COLLATE NOCASE IN (?3, ?7))`

	insertSession = `INSERT INTO sessions (id_hash, user_id, name, email, created_at, updated_at, expires_at)
		VALUES (?, ?, ?, ?, ?, ?, ?)`
)

func (db *database) prepare() error {
	// A date that is NULL or cannot be read keeps nobody out (userTimes); a password that is NULL is no hash.
	const user = `SELECT id, COALESCE(name, ''), email, COALESCE(CAST(createdAt AS TEXT), ''),
		COALESCE(CAST(updateAt AS TEXT), ''), COALESCE(password, '') FROM users `
	for _, p := range []struct {
		stmt  **sql.Stmt
		pool  *sql.DB
		query string
	}{
		{&db.userByEmail, db.reader, user + `WHERE email = ?`},
		{&db.usersByEmailCase, db.reader, user + `WHERE email = ? COLLATE NOCASE LIMIT 2`},
		{&db.anyUser, db.reader, anyUser},
		{&db.insertUser, db.writer, insertUser},
		{&db.replaceHash, db.writer, `UPDATE users SET password = ? WHERE id = ? AND password = ?`},
		{&db.sessionByHash, db.reader, `SELECT user_id, name, email, created_at, updated_at
			FROM sessions WHERE id_hash = ? AND expires_at > ?`},
		{&db.anySession, db.reader, `SELECT EXISTS (SELECT 1 FROM sessions)`},
		{&db.insertSession, db.writer, insertSession},
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
	db.outcome("closing", nil) // SQLite does not fold the log of a file that is no longer at the path
	err := db.reader.Close()
	return errors.Join(err, db.writer.Close())
}

// Ping returns nil when the users table can be read.
func (db *database) Ping(ctx context.Context) error {
	return db.read(ctx, "reading users", func() error {
		return db.anyUser.QueryRow().Scan(new(bool))
	})
}

// InsertUser stores a new account with its email as in user. It returns errEmailTaken when an account has the
// email as it was typed, or trimmed, in any case of its ASCII letters.
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
	var user User
	var passwordHash string
	err := db.read(ctx, "finding user by email", func() (err error) {
		for _, email := range []string{typed, strings.TrimSpace(typed)} {
			user, passwordHash, err = scanUser(db.userByEmail.QueryRow(email))
			if !errors.Is(err, sql.ErrNoRows) {
				return err
			}
		}
		user, passwordHash, err = db.userInAnyCase(strings.TrimSpace(typed))
		return err
	})
	return user, passwordHash, err
}

// userInAnyCase returns errUserNotFound unless exactly one account has the email in some case.
func (db *database) userInAnyCase(email string) (user User, passwordHash string, err error) {
	if strings.Contains(email, "\x00") {
		return User{}, "", errUserNotFound // NOCASE compares no further
	}
	rows, err := db.usersByEmailCase.Query(email)
	if err != nil {
		return User{}, "", err
	}
	defer rows.Close()
	found := 0
	for ; rows.Next(); found++ {
		if user, passwordHash, err = scanUser(rows); err != nil {
			return User{}, "", err
		}
	}
	if err := rows.Err(); err != nil {
		return User{}, "", err
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

// parseColumnTime reads a time of the users table, cast to text, as Prisma does: Unix milliseconds, of which
// a fraction is cut off, or a date with or without a time and a zone.
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

// read makes a query, and looks whether the file is still the one that was opened.
func (db *database) read(ctx context.Context, doing string, query func() error) error {
	return db.outcome(doing, db.query(ctx, query))
}

// readSession is read for lookups of sessions. A look at the files costs as much as the query, so it is taken
// ten times a second.
func (db *database) readSession(ctx context.Context, query func() error) error {
	const doing = "looking a session up"
	err := db.query(ctx, query)
	now := time.Now().UnixMilli()
	if db.gone.Load() == nil && now-db.lookedAt.Load() < 100 {
		return storeError(doing, err)
	}
	db.lookedAt.Store(now)
	return db.outcome(doing, err)
}

// query makes a query when a reading connection is free. It is not bound to ctx: the driver would start a
// goroutine to watch it, and close the connection that it interrupts.
func (db *database) query(ctx context.Context, query func() error) error {
	select {
	case db.reading <- struct{}{}:
	default:
		ctx, cancel := context.WithTimeout(ctx, readerTimeout)
		defer cancel()
		select {
		case db.reading <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	defer func() { <-db.reading }()
	return query()
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
	return db.outcome(doing, db.transact(ctx, do))
}

func (db *database) transact(ctx context.Context, do change) error {
	tx, err := db.writer.BeginTx(ctx, nil)
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%w: other writes are in the way: %w", errRefused, err)
	}
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if err := do(ctx, tx); err != nil {
		return err
	}
	return tx.Commit()
}

// outcome returns storeError(doing, err) if the file and its log are still the ones that were opened.
// Otherwise it returns an errUnavailable, whatever err is: nobody finds again what went into the old ones. It
// stands at the end of each operation, so that a file replaced meanwhile is noticed too.
func (db *database) outcome(doing string, err error) error {
	if gone := db.gone.Load(); gone != nil {
		return fmt.Errorf("%s: %w", doing, *gone)
	}
	for _, file := range db.opened {
		now, statErr := os.Stat(file.path)
		switch {
		case statErr == nil && os.SameFile(now, file.info):
		case statErr == nil, errors.Is(statErr, fs.ErrNotExist):
			db.abandon.Do(db.foldBack)
			return fmt.Errorf("%s: %w", doing, *db.gone.Load())
		default:
			return fmt.Errorf("%s: %w: %w", doing, errUnavailable, statErr)
		}
	}
	return storeError(doing, err)
}

// foldBack folds the write-ahead log into the file that was opened, closes all connections and notes the
// error that says so. SQLite would leave the log where it is, and whoever next opens the file that now stands
// at the path would play it into that one. (https://www.sqlite.org/howtocorrupt.html, section 1.4)
func (db *database) foldBack() {
	ctx, cancel := context.WithTimeout(context.Background(), writeTimeout)
	defer cancel()
	db.reader.Close()
	_, err := db.writer.ExecContext(ctx, `PRAGMA wal_checkpoint(TRUNCATE)`)
	err = errors.Join(
		fmt.Errorf("%w: the file at DB_PATH=%q, or its -wal, was deleted or replaced: restart the service",
			errUnavailable, db.path), err, db.writer.Close())
	db.gone.Store(&err)
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
	case errors.Is(err, errUnavailable):
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
	case sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_MISUSE, sqlite3.SQLITE_RANGE:
		return err
	case sqlite3.SQLITE_ERROR:
		// All statements fitted the tables at the start.
		return fmt.Errorf("%w: somebody changed the tables, restart the service: %w", errUnavailable, err)
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

func (s *sqliteSessions) Get(ctx context.Context, id string) (User, error) {
	var user User
	err := s.db.readSession(ctx, func() error {
		row := s.db.sessionByHash.QueryRow(hashID(id), time.Now().UnixMilli())
		err := row.Scan(&user.ID, &user.Name, &user.Email, &user.CreatedAt, &user.UpdatedAt)
		if errors.Is(err, sql.ErrNoRows) {
			return errNoSession
		}
		return err
	})
	return user, err
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

// Ping returns nil when the sessions table can be read.
func (s *sqliteSessions) Ping(ctx context.Context) error {
	return s.db.read(ctx, "reading sessions", func() error {
		return s.db.anySession.QueryRow().Scan(new(bool))
	})
}

// Close leaves the account database to whoever opened it.
func (s *sqliteSessions) Close() error { return nil }

func hashID(id string) []byte {
	sum := sha256.Sum256([]byte(id))
	return sum[:]
}
