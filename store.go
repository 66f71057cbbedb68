// The account database: the users, and the sessions when there is no Redis, in one SQLite file.

package main

import (
	"context"
	"crypto/sha256"
	"database/sql"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
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
	errOtherFile    = errors.New("another file is in its place")
)

const (
	setUpTimeout  = 10 * time.Second // for other programs' locks at the start
	turnTimeout   = time.Second      // for a connection; SQLite then waits as long again for other programs
	watchInterval = 100 * time.Millisecond
)

//go:embed schema.sql
var schema string

// database is the SQLite file. The original program may use the same file at the same time.
//
// All connections are opened at the start and never again. SQLite pairs a file and its write-ahead log by
// their path: a connection opened after the file was replaced would read the new file through the old log. So
// no statement is bound to a context: the driver gives up a connection that a context interrupted, and the
// pool would open another.
type database struct {
	name    string                // the file and its pragmas, for the driver
	files   []watchedFile         // the file, the configured link to it if any, its -wal, its -shm
	writer  *sql.DB               // one connection, as SQLite allows one writer
	reader  *sql.DB               // several, which in WAL mode never wait for the writer
	writing chan struct{}         // holds an element for each write in progress
	reading chan struct{}         // holds an element for each read in progress
	closed  chan struct{}         // closed by Close
	watcher sync.WaitGroup        // of watch
	gone    atomic.Pointer[error] // set once a file is not the one that was opened

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

// watchedFile is a file as it was when it was opened.
type watchedFile struct {
	path string
	info os.FileInfo
}

// compare returns an error if the path no longer names the file that was opened: errOtherFile if it names
// another one.
func (f watchedFile) compare() error {
	info, err := os.Stat(f.path)
	if err == nil && !os.SameFile(info, f.info) {
		return errOtherFile
	}
	return err
}

// openDatabase opens the file at path and applies the schema. A missing file is created, readable to its
// owner only. A file whose tables are another program's is left as it was, and the error names the table.
// When ctx ends, so does the wait for other programs' locks.
func openDatabase(ctx context.Context, path string) (*database, error) {
	readers := runtime.NumCPU() + 1
	db := &database{
		writing: make(chan struct{}, 1),
		reading: make(chan struct{}, readers),
		closed:  make(chan struct{}),
	}
	inWAL, err := db.openFile(path)
	if err != nil {
		return nil, explain(path, err)
	}
	target := db.files[0].path
	if err := db.openPools(target, readers); err != nil {
		return nil, err
	}
	if err := db.setUp(ctx, inWAL); err != nil {
		db.Close()
		return nil, explain(target, err)
	}
	db.watcher.Go(db.watch)
	return db, nil
}

// openFile opens the file, creates it if it is missing, and returns whether it is in WAL mode.
func (db *database) openFile(path string) (inWAL bool, err error) {
	file, err := openOrCreate(path)
	if err != nil {
		return false, err
	}
	defer file.Close() // before SQLite opens the file: to close it later would release SQLite's locks
	info, err := file.Stat()
	if err != nil {
		return false, err
	}
	target, err := filepath.EvalSymlinks(path) // the log is beside it
	if err != nil {
		return false, err
	}
	db.files = []watchedFile{{target, info}, {path, info}}
	return checkLog(file, target)
}

// openOrCreate creates no file where a write-ahead log is: to SQLite, the log would be the new file's.
func openOrCreate(path string) (*os.File, error) {
	log := path + "-wal"
	if _, err := os.Stat(log); err != nil {
		return os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w; its write-ahead log %q is there: put the file back, or remove the log",
			err, log)
	}
	return file, err
}

// checkLog returns whether the file is in WAL mode. It is an error if it is not, but has a write-ahead log
// beside it. That is another file's, which a backup has replaced: SQLite would write the log into the backup.
func checkLog(file *os.File, path string) (inWAL bool, err error) {
	log := path + "-wal"
	_, logErr := os.Stat(log) // before the header: a start that switches to WAL writes the header first
	inWAL, err = readJournalMode(file)
	if err == nil && !inWAL && logErr == nil {
		err = fmt.Errorf("the write-ahead log %q belongs to another file: it has to be removed, with %q",
			log, path+"-shm")
	}
	return inWAL, err
}

// readJournalMode reads the header (https://www.sqlite.org/fileformat.html, section 1.3). A new file has
// none.
func readJournalMode(file io.ReaderAt) (inWAL bool, err error) {
	var versions [2]byte // of who may write and read the file; 1: rollback journal, 2: write-ahead log
	if _, err := file.ReadAt(versions[:], 18); err != nil && err != io.EOF {
		return false, err
	}
	return versions == [2]byte{2, 2}, nil
}

// openPools makes the pools, which connect later. The pragmas are in the name so that every connection has
// them. synchronous(FULL): what was committed must outlive a power cut. temp_store(MEMORY): a scratch image
// has no /tmp. _dqs=0: a column that is missing must not be taken for a string.
func (db *database) openPools(target string, readers int) (err error) {
	escaped := (&url.URL{Path: filepath.ToSlash(filepath.Clean(target))}).EscapedPath()
	db.name = "file:" + escaped + "?_pragma=busy_timeout(1000)&_pragma=synchronous(FULL)" +
		"&_pragma=foreign_keys(1)&_pragma=temp_store(MEMORY)&_txlock=immediate&_dqs=0"
	if db.writer, err = openPool(db.name, 1); err != nil {
		return err
	}
	db.reader, err = openPool(db.name+"&_query_only=1", readers)
	return err
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

// setUp brings the file into shape and opens all connections.
func (db *database) setUp(ctx context.Context, inWAL bool) error {
	err := whenFree(ctx, func() error { return db.transact(applySchema) })
	if err != nil {
		return err
	}
	if err := db.switchToWAL(ctx, inWAL); err != nil {
		return fmt.Errorf("switching to a write-ahead log: %w", err)
	}
	if err := db.prepare(); err != nil {
		return err
	}
	if err := db.openReaders(); err != nil {
		return fmt.Errorf("opening connections: %w", err)
	}
	for _, suffix := range []string{"-wal", "-shm"} {
		path := db.files[0].path + suffix
		info, _ := os.Stat(path) // nil, if it is gone already
		db.files = append(db.files, watchedFile{path, info})
	}
	if err := db.compareFiles(); err != nil {
		return err
	}
	// What a crash left in the log goes into the file, unless another program is reading the log.
	_, err = db.writer.Exec(`PRAGMA wal_checkpoint(TRUNCATE)`)
	return err
}

// whenFree repeats what other processes' locks keep from being done.
func whenFree(ctx context.Context, do func() error) error {
	for deadline := time.Now().Add(setUpTimeout); ; time.Sleep(20 * time.Millisecond) {
		err := do()
		if sqliteCode(err)&0xff != sqlite3.SQLITE_BUSY || time.Now().After(deadline) {
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// applySchema applies the schema and tries it out with an account and a session. A file that does not take
// them is another program's.
func applySchema(tx *sql.Tx) error {
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
	_, err = tx.Exec(`ROLLBACK TO trial`)
	return err
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
		INSERT INTO sessions SELECT id_hash, user_id, name, email, created_at, updated_at, expires_at
			FROM strict_sessions;
		DROP TABLE strict_sessions;`, nil
}

// setUpError says that the file is another program's if its tables are the trouble, and not a full disk.
func setUpError(doing string, err error) error {
	switch sqliteCode(err) & 0xff {
	case sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH:
		return fmt.Errorf("%s: the file is another program's: %w", doing, err)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// switchToWAL switches to a write-ahead log and proves with a read that it works: it needs shared memory,
// which some file systems do not have. There a file that was not in WAL mode before goes back to a rollback
// journal, so that the original can still open it.
func (db *database) switchToWAL(ctx context.Context, inWAL bool) error {
	err := whenFree(ctx, func() error {
		if _, err := db.writer.Exec(`PRAGMA journal_mode(WAL)`); err != nil { // SQLite does not wait here
			return err
		}
		return db.writer.QueryRow(anyUser).Scan(new(bool))
	})
	if !inWAL && lacksSharedMemory(err) {
		if backErr := db.leaveWAL(); backErr != nil {
			return fmt.Errorf("%w; going back to a rollback journal: %w", err, backErr)
		}
	}
	return err
}

// leaveWAL switches to a rollback journal. A connection in exclusive locking mode needs no shared memory.
func (db *database) leaveWAL() error {
	db.writer.Close()
	pool, err := openPool(db.name+"&_pragma=locking_mode(EXCLUSIVE)", 1)
	if err != nil {
		return err
	}
	defer pool.Close()
	return whenFree(context.Background(), func() error {
		_, err := pool.Exec(`PRAGMA journal_mode(DELETE)`)
		return err
	})
}

func lacksSharedMemory(err error) bool {
	return slices.Contains([]int{sqlite3.SQLITE_IOERR_SHMOPEN, sqlite3.SQLITE_IOERR_SHMLOCK,
		sqlite3.SQLITE_IOERR_SHMMAP}, sqliteCode(err)) // SHMSIZE is a full disk
}

// explain adds to an error of the start what SQLite's words do not say.
func explain(path string, err error) error {
	folder := filepath.Dir(path)
	code := sqliteCode(err) & 0xff
	switch {
	case lacksSharedMemory(err):
		return fmt.Errorf("%w; the file system of the folder %q has no shared memory, which a write-ahead "+
			"log needs: keep the file on another one", err, folder)
	case code == sqlite3.SQLITE_CORRUPT:
		return fmt.Errorf("%w; if a backup was put there, remove %q first, and put it there again", err,
			path+"-wal")
	case code == sqlite3.SQLITE_CANTOPEN, code == sqlite3.SQLITE_READONLY, errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w; the file and the folder %q must be writable, for files beside it that end "+
			"in -wal and -shm", err, folder)
	}
	return err
}

const (
	anyUser = `SELECT EXISTS (SELECT 1 FROM users)`

	// It inserts nothing where the email is taken. ?3 is the trimmed email, ?7 the one that was typed.
	insertUser = `INSERT INTO users (id, name, email, createdAt, updateAt, password)
		SELECT ?1, ?2, ?3, ?4, ?5, ?6
		WHERE NOT EXISTS (SELECT 1 FROM users WHERE email COLLATE NOCASE IN (?3, ?7))`

	insertSession = `INSERT INTO sessions (id_hash, user_id, name, email, created_at, updated_at, expires_at)
		VALUES (?, ?, ?, ?, ?, ?, ?)`
)

// statement is one that is prepared at the start.
type statement struct {
	prepared **sql.Stmt
	pool     *sql.DB
	query    string
}

func (db *database) statements() []statement {
	// A date that is NULL or cannot be read keeps nobody out (userTimes); a password that is NULL is no hash.
	const user = `SELECT id, COALESCE(name, ''), email, COALESCE(CAST(createdAt AS TEXT), ''),
		COALESCE(CAST(updateAt AS TEXT), ''), COALESCE(password, '') FROM users `
	return []statement{
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
	}
}

func (db *database) prepare() error {
	for _, s := range db.statements() {
		var err error
		if *s.prepared, err = s.pool.Prepare(s.query); err != nil {
			return fmt.Errorf("preparing %s: %w", s.query, err)
		}
	}
	return nil
}

// openReaders opens all reading connections. The first read of each opens the log.
func (db *database) openReaders() error {
	for range cap(db.reading) {
		conn, err := db.reader.Conn(context.Background())
		if err != nil {
			return err
		}
		defer conn.Close() // it stays in the pool
		row := conn.QueryRowContext(context.Background(), anyUser)
		if err := row.Scan(new(bool)); err != nil {
			return err
		}
	}
	return nil
}

// watch compares the files until Close. Lookups rely on it, and do not compare them.
func (db *database) watch() {
	ticker := time.NewTicker(watchInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			db.compareFiles()
			db.removeLog()
		case <-db.closed:
			return
		}
	}
}

// compareFiles returns an errUnavailable if a file was deleted or replaced, and keeps returning it. SQLite
// would not notice: its commits would go into an unlinked file or, without the -shm, ignore other programs'
// locks. So nothing is written, checkpointed or closed any more.
func (db *database) compareFiles() error {
	for _, file := range db.files {
		err := file.compare()
		if errors.Is(err, fs.ErrPermission) { // it may pass
			return fmt.Errorf("%w: %w", errUnavailable, err)
		}
		if err != nil {
			gone := fmt.Errorf("%w: the file %q was deleted or replaced: restart the service: %w",
				errUnavailable, file.path, err)
			db.gone.CompareAndSwap(nil, &gone)
		}
	}
	if gone := db.gone.Load(); gone != nil {
		return *gone
	}
	return nil
}

// removeLog removes, once the file was replaced, our -wal: the next program would apply it to the new file.
// Once the -wal was deleted or replaced it removes our -shm: the next program would take it for the index of
// its own -wal (https://www.sqlite.org/howtocorrupt.html, section 1.4). A file that was only moved away keeps
// its -wal. Only one goroutine at a time may call it.
func (db *database) removeLog() {
	if db.gone.Load() == nil || len(db.files) < 4 { // nothing has happened, or the log is not opened yet
		return
	}
	file, log, sharedMemory := db.files[0], db.files[2], db.files[3]
	if errors.Is(file.compare(), errOtherFile) && log.compare() == nil {
		os.Remove(log.path)
	}
	err := log.compare()
	logIsGone := errors.Is(err, errOtherFile) || errors.Is(err, fs.ErrNotExist)
	if logIsGone && sharedMemory.compare() == nil {
		os.Remove(sharedMemory.path)
	}
}

// Close closes the connections, the writer last, which checkpoints the log. It closes none once a file was
// deleted or replaced: they end with the process.
func (db *database) Close() error {
	close(db.closed)
	db.watcher.Wait()
	if err := db.compareFiles(); err != nil {
		db.removeLog()
		return fmt.Errorf("closing: %w", err)
	}
	err := db.reader.Close()
	return errors.Join(err, db.writer.Close())
}

// Ping returns nil when the users table can be read.
func (db *database) Ping(ctx context.Context) error {
	return db.ping(ctx, "reading users", db.anyUser)
}

func (db *database) ping(ctx context.Context, doing string, query *sql.Stmt) error {
	if err := db.compareFiles(); err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	return db.withReader(ctx, doing, func() error { return query.QueryRow().Scan(new(bool)) })
}

// InsertUser stores a new account with its email as in user. It returns errEmailTaken when an account has the
// email as it was typed, or trimmed, in any case of its ASCII letters.
func (db *database) InsertUser(ctx context.Context, user User, typed, passwordHash string) error {
	createdAt, err := time.Parse(timeFormat, user.CreatedAt)
	if err != nil {
		return fmt.Errorf("inserting user: %w", err)
	}
	return db.withWriter(ctx, "inserting user", func(tx *sql.Tx) error {
		millis := createdAt.UnixMilli() // as Prisma writes it
		result, err := tx.Stmt(db.insertUser).
			Exec(user.ID, user.Name, user.Email, millis, millis, passwordHash, typed)
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
	err := db.withReader(ctx, "finding user by email", func() (err error) {
		for _, email := range slices.Compact([]string{typed, strings.TrimSpace(typed)}) {
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
	return db.withWriter(ctx, "replacing password hash", func(tx *sql.Tx) error {
		_, err := tx.Stmt(db.replaceHash).Exec(newHash, userID, oldHash)
		return err
	})
}

// withReader makes a query, when a reading connection is free.
func (db *database) withReader(ctx context.Context, doing string, query func() error) error {
	return db.translate(doing, db.inTurn(ctx, db.reading, query))
}

// withWriter makes a change in one transaction, when the writing connection is free.
func (db *database) withWriter(ctx context.Context, doing string, change func(*sql.Tx) error) error {
	return db.translate(doing, db.inTurn(ctx, db.writing, func() error { return db.transact(change) }))
}

// inTurn calls do once there is room among the turns.
func (db *database) inTurn(ctx context.Context, turns chan struct{}, do func() error) error {
	if !takeTurn(ctx, turns) {
		return fmt.Errorf("%w: other requests are in the way", errRefused)
	}
	defer func() { <-turns }()
	if gone := db.gone.Load(); gone != nil {
		return *gone
	}
	return do()
}

// takeTurn returns whether there was room among the turns before turnTimeout and ctx's deadline. A client
// that hangs up does not end the wait: what it asked for is done.
func takeTurn(ctx context.Context, turns chan<- struct{}) bool {
	wait := turnTimeout
	if deadline, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(deadline))
	}
	if wait <= 0 {
		return false
	}
	select {
	case turns <- struct{}{}:
		return true
	default: // only now is a timer needed
	}
	select {
	case turns <- struct{}{}:
		return true
	case <-time.After(wait):
		return false
	}
}

// transact commits a change. It compares the files before and after: a commit into a file that was replaced
// is lost.
func (db *database) transact(change func(*sql.Tx) error) error {
	tx, err := db.writer.Begin()
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if err := change(tx); err != nil {
		return err
	}
	if err := db.compareFiles(); err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return err
	}
	db.compareFiles()
	if gone := db.gone.Load(); gone != nil {
		return *gone
	}
	return nil
}

// translate adds what failed, and maps the errors of SQLite to this program's: errRefused where SQLite
// refused, errUnavailable where it could not read or write. A constraint, a mismatch or a misuse is a fault
// of this program, and so is an error that is not SQLite's. Once a file was deleted or replaced, that is the
// error, whatever err is.
func (db *database) translate(doing string, err error) error {
	if gone := db.gone.Load(); gone != nil {
		err = *gone
	}
	if err == nil {
		return nil
	}
	switch sqliteCode(err) & 0xff { // https://www.sqlite.org/rescode.html
	case sqlite3.SQLITE_OK: // no error of SQLite
		if db.isClosed() {
			err = fmt.Errorf("%w: it is closed: %w", errUnavailable, err)
		}
	case sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_MISUSE, sqlite3.SQLITE_RANGE:
	case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY,
		sqlite3.SQLITE_PERM:
		err = fmt.Errorf("%w: %w", errRefused, err)
	case sqlite3.SQLITE_ERROR: // all statements fitted the tables at the start
		err = fmt.Errorf("%w: somebody changed the tables, restart the service: %w", errUnavailable, err)
	default: // an input or output error, or a file that is no database
		err = fmt.Errorf("%w: %w", errUnavailable, err)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

func (db *database) isClosed() bool {
	select {
	case <-db.closed:
		return true
	default:
		return false
	}
}

// sqliteCode returns the extended result code of an error of SQLite, and SQLITE_OK of any other.
func sqliteCode(err error) int {
	if e, ok := errors.AsType[*sqlite.Error](err); ok {
		return e.Code()
	}
	return sqlite3.SQLITE_OK
}

// sqliteSessions is the embedded session backend: rows beside the accounts, which outlive a restart.
type sqliteSessions struct {
	db *database
}

// Create sweeps a hundred expired sessions, too.
func (s *sqliteSessions) Create(ctx context.Context, id string, user User, ttl time.Duration) error {
	now := time.Now()
	return s.db.withWriter(ctx, "creating session", func(tx *sql.Tx) error {
		if _, err := tx.Stmt(s.db.sweepSessions).Exec(now.UnixMilli()); err != nil {
			return err
		}
		_, err := tx.Stmt(s.db.insertSession).Exec(hashID(id),
			user.ID, user.Name, user.Email, user.CreatedAt, user.UpdatedAt, now.Add(ttl).UnixMilli())
		return err
	})
}

func (s *sqliteSessions) Get(ctx context.Context, id string) (User, error) {
	var user User
	err := s.db.withReader(ctx, "finding session", func() error {
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
	return s.db.withWriter(ctx, "deleting session", func(tx *sql.Tx) error {
		now := time.Now().UnixMilli()
		result, err := tx.Stmt(s.db.deleteSession).Exec(hashID(id), now)
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
	return s.db.ping(ctx, "reading sessions", s.db.anySession)
}

// Close leaves the account database to whoever opened it.
func (s *sqliteSessions) Close() error { return nil }

func hashID(id string) []byte {
	sum := sha256.Sum256([]byte(id))
	return sum[:]
}
