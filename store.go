// The account database: users, and sessions when there is no Redis, in one SQLite file.

package main

import (
	"context"
	"crypto/sha256"
	"database/sql"
	_ "embed"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// User is an account as its owner sees it, and what a session holds of it. Times are in timeFormat. The
// JSON is the original program's, its spelling of updateAt included.
type User struct {
	ID        string `json:"id" redis:"id"`
	Name      string `json:"name" redis:"name"`
	Email     string `json:"email" redis:"email"`
	CreatedAt string `json:"createdAt" redis:"createdAt"`
	UpdatedAt string `json:"updateAt" redis:"updatedAt"`
}

var errUserNotFound = errors.New("no such user")

const writeTimeout = 2500 * time.Millisecond // more than the 2 s for which SQLite waits for another process

//go:embed schema.sql
var schema string

// database is the SQLite file: one connection that writes, as SQLite allows no more, and several that
// read, which in WAL mode never wait for it.
type database struct {
	writer, reader *sql.DB
	sessionByHash  *sql.Stmt
}

// openDatabase opens the file at path, creates it when it is missing, readable to its owner only, and
// applies the schema.
func openDatabase(path string) (*database, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	file.Close()
	// The pragmas stand in the name so that every connection of a pool has them. synchronous(FULL): a 201
	// must outlive a power cut. temp_store(MEMORY): a scratch image has no /tmp.
	name := "file:" + (&url.URL{Path: filepath.ToSlash(filepath.Clean(path))}).EscapedPath() + "?_pragma=busy_timeout(2000)" +
		"&_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)&_pragma=foreign_keys(1)&_pragma=temp_store(MEMORY)"
	db := &database{}
	db.writer, _ = sql.Open("sqlite", name+"&_txlock=immediate") // opening only parses the name
	db.reader, _ = sql.Open("sqlite", name+"&_query_only=1")
	db.writer.SetMaxOpenConns(1)
	db.reader.SetMaxOpenConns(runtime.NumCPU() + 1)
	db.reader.SetMaxIdleConns(runtime.NumCPU() + 1)
	if _, err = db.writer.Exec(schema); err == nil {
		db.sessionByHash, err = db.reader.Prepare(
			`SELECT user_id, name, email, created_at, updated_at FROM sessions WHERE id_hash = ? AND expires_at > ?`)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("applying the schema: %w", err), db.Close())
	}
	return db, nil
}

// Close closes the connections, the writer last: it folds the write-ahead log into the file.
func (db *database) Close() error { return errors.Join(db.reader.Close(), db.writer.Close()) }

// Ping reads from the users table.
func (db *database) Ping(ctx context.Context) error {
	row := db.reader.QueryRowContext(ctx, `SELECT count(*) FROM (SELECT 1 FROM users LIMIT 1)`)
	return storeError("reading users", row.Scan(new(int)))
}

// InsertUser stores a new account; errEmailTaken when its email has one.
func (db *database) InsertUser(ctx context.Context, u User, passwordHash string) error {
	return db.write(ctx, "inserting user", []any{
		`INSERT INTO users (id, name, email, created_at, updated_at, password_hash) VALUES (?, ?, ?, ?, ?, ?)`,
		u.ID, u.Name, u.Email, u.CreatedAt, u.UpdatedAt, passwordHash})
}

// UserByEmail returns the account with that email and its password hash, or errUserNotFound.
func (db *database) UserByEmail(ctx context.Context, email string) (u User, passwordHash string, err error) {
	row := db.reader.QueryRowContext(ctx,
		`SELECT id, name, email, created_at, updated_at, password_hash FROM users WHERE email = ?`, email)
	err = row.Scan(&u.ID, &u.Name, &u.Email, &u.CreatedAt, &u.UpdatedAt, &passwordHash)
	if errors.Is(err, sql.ErrNoRows) {
		return User{}, "", errUserNotFound
	}
	return u, passwordHash, storeError("finding user by email", err)
}

// ReplacePasswordHash stores a password hash anew, unless it is no longer the old one.
func (db *database) ReplacePasswordHash(ctx context.Context, userID, old, new string) error {
	return db.write(ctx, "replacing password hash",
		[]any{`UPDATE users SET password_hash = ? WHERE id = ? AND password_hash = ?`, new, userID, old})
}

// write runs statements, each with its arguments behind it, in one transaction. It is not cancelled when the
// client hangs up, and with its turn at the one writer takes at most writeTimeout, under the contract's 3 s.
func (db *database) write(ctx context.Context, doing string, statements ...[]any) (err error) {
	defer func() { err = storeError(doing, err) }()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), writeTimeout)
	defer cancel()
	tx, err := db.writer.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	for _, st := range statements {
		if _, err := tx.ExecContext(ctx, st[0].(string), st[1:]...); err != nil {
			return err
		}
	}
	return tx.Commit()
}

// storeError says what failed. What took too long, or was refused for reasons outside this program (locked,
// full, read-only, corrupt, out of reach), is errUnavailable. The codes are https://www.sqlite.org/rescode.html.
func storeError(doing string, err error) error {
	code, late := 0, errors.Is(err, context.DeadlineExceeded) || errors.Is(err, sql.ErrTxDone) // rolled back at its deadline
	if e, ok := errors.AsType[*sqlite.Error](err); ok {
		code = e.Code()
	}
	ours := []int{0, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_MISUSE, sqlite3.SQLITE_RANGE}
	switch {
	case err == nil:
		return nil
	case code == sqlite3.SQLITE_CONSTRAINT_UNIQUE: // there is one such constraint, on users' email
		return errEmailTaken
	case late || !slices.Contains(ours, code&0xff): // the primary code
		err = unavailable(err)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// sqliteSessions is the embedded session backend: rows beside the accounts, which outlive a restart.
type sqliteSessions struct{ *database }

// Create sweeps a hundred expired sessions, too.
func (s *sqliteSessions) Create(ctx context.Context, id, replaced string, u User, ttl time.Duration) error {
	now := time.Now()
	return s.write(ctx, "creating session", []any{`DELETE FROM sessions WHERE id_hash = ? OR id_hash IN
			(SELECT id_hash FROM sessions WHERE expires_at <= ? LIMIT 100)`, hashID(replaced), now.UnixMilli(),
	}, []any{`INSERT INTO sessions (id_hash, user_id, name, email, created_at, updated_at, expires_at) VALUES (?, ?, ?, ?, ?, ?, ?)`,
		hashID(id), u.ID, u.Name, u.Email, u.CreatedAt, u.UpdatedAt, now.Add(ttl).UnixMilli()})
}

// Get does not watch ctx: database/sql and the driver would start a goroutine each for a read of microseconds.
func (s *sqliteSessions) Get(_ context.Context, id string) (u User, err error) {
	row := s.sessionByHash.QueryRow(hashID(id), time.Now().UnixMilli())
	err = row.Scan(&u.ID, &u.Name, &u.Email, &u.CreatedAt, &u.UpdatedAt)
	if errors.Is(err, sql.ErrNoRows) {
		return User{}, errNoSession
	}
	return u, storeError("looking a session up", err)
}

func (s *sqliteSessions) Delete(ctx context.Context, id string) error {
	return s.write(ctx, "deleting session", []any{`DELETE FROM sessions WHERE id_hash = ?`, hashID(id)})
}

func hashID(id string) []byte {
	sum := sha256.Sum256([]byte(id))
	return sum[:]
}
