// Sessions: what a session backend promises, session ids and times, and the Redis backend.

package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gomodule/redigo/redis"
)

// User is an account as its owner sees it, and what a session holds of it. Times are in timeFormat. The JSON
// is the original program's, its spelling of updateAt included.
type User struct {
	ID        string `json:"id"`
	Name      string `json:"name"`
	Email     string `json:"email"`
	CreatedAt string `json:"createdAt"`
	UpdatedAt string `json:"updateAt"`
}

// SessionStore keeps sessions. It has no update. Otherwise a slow request could write a session back after
// its sign-out.
//
// Every method may be called from any goroutine and gives up within 3 s, but for a statement of SQLite that
// has begun. "There is no such session" (errNoSession) signs a user out. "I could not find out" must not: it
// is an error that wraps errUnavailable.
type SessionStore interface {
	// Create makes session id for user, to live for ttl (whole seconds). After an error the session may
	// exist, but then it expires.
	Create(ctx context.Context, id string, user User, ttl time.Duration) error
	// Get returns the user as of the session's creation. A session that is missing, expired or unreadable is
	// errNoSession.
	Get(ctx context.Context, id string) (User, error)
	// Delete ends session id. One that is missing or expired is errNoSession.
	Delete(ctx context.Context, id string) error
	// Ping returns nil when the store answers, even if it takes no writes.
	Ping(ctx context.Context) error
	// Close releases what the store holds. Calls in progress return errUnavailable.
	Close() error
}

var (
	errNoSession   = errors.New("no such session")
	errUnavailable = errors.New("store unavailable")
	// errRefused is an errUnavailable of a store that is there, but did not do what it was asked for.
	errRefused = fmt.Errorf("%w: refused", errUnavailable)
)

// newUUID returns a random (version 4) UUID, RFC 9562: 122 bits from the system's generator.
func newUUID() string {
	var b [16]byte
	rand.Read(b[:])         // never returns an error: it would end the process
	b[6] = b[6]&0x0f | 0x40 // version 4
	b[8] = b[8]&0x3f | 0x80 // variant of RFC 9562
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// isUUID tells whether s has the form of a UUID, of any version.
func isUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i := range len(s) {
		switch c := s[i]; {
		case i == 8 || i == 13 || i == 18 || i == 23:
			if c != '-' {
				return false
			}
		case c >= '0' && c <= '9', c >= 'a' && c <= 'f', c >= 'A' && c <= 'F':
		default:
			return false
		}
	}
	return true
}

// timeFormat is how times are sent and, in Redis, stored: UTC, milliseconds, as JavaScript's
// Date.toISOString.
const timeFormat = "2006-01-02T15:04:05.000Z"

// formatTime returns t in timeFormat, and false if its year is not from 0 to 9999.
func formatTime(t time.Time) (string, bool) {
	t = t.UTC()
	if t.Year() < 0 || t.Year() > 9999 {
		return "", false
	}
	return t.Format(timeFormat), true
}

// parseRFC3339 reads a time of RFC 3339 and returns it in timeFormat.
func parseRFC3339(text string) (string, bool) {
	t, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return "", false
	}
	if len(text) == len(timeFormat) && text[19] == '.' && text[23] == 'Z' {
		return text, true // it is in timeFormat
	}
	return formatTime(t)
}

// parseSessionTime reads a time of a session hash and returns it in timeFormat. It takes RFC 3339 and
// JavaScript's Date.toString, such as "Sun Mar 30 2025 20:00:00 GMT+0000 (Coordinated Universal Time)", whose
// bracket is in the server's language and may be missing.
func parseSessionTime(text string) (string, bool) {
	if formatted, ok := parseRFC3339(text); ok {
		return formatted, true
	}
	text, _, _ = strings.Cut(text, " (")
	t, err := time.Parse("Mon Jan 02 2006 15:04:05 GMT-0700", text)
	if err != nil {
		return "", false
	}
	return formatTime(t)
}

// userTimes returns a user's two times in timeFormat, as far as parse can read them. A date that cannot be
// read must not sign anybody out. updated lists candidates for the second time, the best first. A time that
// cannot be read takes the other's value, and if neither can be, both are 1970.
func userTimes(parse func(string) (string, bool), createdAt string, updated ...string) (string, string) {
	created, createdOK := parse(createdAt)
	for _, text := range updated {
		updatedAt, ok := parse(text)
		if ok && createdOK {
			return created, updatedAt
		}
		if ok {
			return updatedAt, updatedAt
		}
	}
	if createdOK {
		return created, created
	}
	const epoch = "1970-01-01T00:00:00.000Z"
	return epoch, epoch
}

// redisSessions is the Redis backend: one hash a session, as the original program wrote them.
type redisSessions struct {
	router *router
}

func newRedisSessions(target *redisTarget, log *slog.Logger) *redisSessions {
	dialer := &redisDialer{target: target, dialTCP: new(net.Dialer).DialContext}
	return &redisSessions{newRouter(dialer, log)}
}

func sessionKey(id string) string { return "session:" + id }

// How often an operation may be sent. HGETALL and DEL are retried once after a lost connection. A creation is
// not: a first one that arrives late could bring the session back after its DEL.
const (
	sendOnce  = 1
	sendAgain = 2
)

// Create makes the session in one transaction on one key, so that none is stored without an end.
func (s *redisSessions) Create(ctx context.Context, id string, user User, ttl time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, operationTimeout) // of the deletion, too
	defer cancel()
	key := sessionKey(id)
	replies, err := s.router.do(ctx, key, sendOnce,
		command{"MULTI"},
		command{"HSET", key, "id", user.ID, "name", user.Name, "email", user.Email,
			"createdAt", user.CreatedAt, "updatedAt", user.UpdatedAt},
		command{"EXPIRE", key, int64(ttl / time.Second)},
		command{"EXEC"})
	if err == nil {
		err = checkCreated(replies[3])
	}
	if errors.Is(err, errRefused) {
		// Part of it may have been done: EXEC does not roll back, and after a refused MULTI the rest runs
		// singly. What this leaves behind expires, should the deletion fail.
		s.Delete(ctx, id)
	}
	return err
}

// checkCreated checks EXEC's reply. If an element were an error, do would have returned it.
func checkCreated(reply any) error {
	results, ok := reply.([]any)
	if !ok || len(results) != 2 {
		return errReplyKind
	}
	if results[1] != int64(1) {
		return fmt.Errorf("%w: EXPIRE has not set the session's end", errRefused)
	}
	return nil
}

func (s *redisSessions) Get(ctx context.Context, id string) (User, error) {
	key := sessionKey(id)
	replies, err := s.router.do(ctx, key, sendAgain, command{"HGETALL", key})
	if isRefusal(err, "WRONGTYPE") {
		return User{}, errNoSession // the key holds something else than a hash
	}
	if err != nil {
		return User{}, err
	}
	return parseSession(replies[0])
}

// parseSession reads HGETALL's reply: names and values by turns. Without an id it is errNoSession.
func parseSession(reply any) (User, error) {
	fields, ok := reply.([]any)
	if !ok || len(fields)%2 != 0 {
		return User{}, errReplyKind
	}
	var user User
	var createdAt, updatedAt, updateAt string
	for i := 0; i < len(fields); i += 2 {
		name, nameOK := fields[i].([]byte)
		value, valueOK := fields[i+1].([]byte)
		if !nameOK || !valueOK {
			return User{}, errReplyKind
		}
		switch string(name) {
		case "id":
			user.ID = string(value)
		case "name":
			user.Name = string(value)
		case "email":
			user.Email = string(value)
		case "createdAt":
			createdAt = string(value)
		case "updatedAt":
			updatedAt = string(value)
		case "updateAt": // the original's
			updateAt = string(value)
		}
	}
	if user.ID == "" {
		return User{}, errNoSession
	}
	user.CreatedAt, user.UpdatedAt = userTimes(parseSessionTime, createdAt, updatedAt, updateAt)
	return user, nil
}

func (s *redisSessions) Delete(ctx context.Context, id string) error {
	key := sessionKey(id)
	replies, err := s.router.do(ctx, key, sendAgain, command{"DEL", key})
	if err != nil {
		return err
	}
	deleted, ok := replies[0].(int64)
	if !ok {
		return errReplyKind
	}
	if deleted == 0 {
		return errNoSession
	}
	return nil
}

// Ping returns nil when any server of a cluster answers.
func (s *redisSessions) Ping(ctx context.Context) error { return s.router.ping(ctx) }

func (s *redisSessions) Close() error {
	s.router.close(errClosed)
	return nil
}

// metrics returns what was counted over all servers.
func (s *redisSessions) metrics() map[string]int64 {
	stats := &s.router.stats
	return map[string]int64{
		"redis_operations_total":   stats.operations.Load(),
		"redis_flushes_total":      stats.flushes.Load(),
		"redis_retries_total":      stats.retries.Load(),
		"redis_redirections_total": stats.redirections.Load(),
		"redis_dials_total":        stats.dials.Load(),
		"redis_queue":              stats.queued.Load(),
	}
}

// redisStats counts since the start, but for queued, which tells how many operations wait to be sent.
type redisStats struct {
	operations   atomic.Int64
	flushes      atomic.Int64
	retries      atomic.Int64
	redirections atomic.Int64
	dials        atomic.Int64
	queued       atomic.Int64
}

const (
	operationTimeout = 2 * time.Second  // of an operation, from its beginning to its replies
	proofTimeout     = time.Second      // of a connection, from one proof to the next
	connectTimeout   = 10 * time.Second // name, TCP, TLS, login and first ECHO together
	attemptInterval  = time.Second      // of connecting anew while no attempt has succeeded
	sentinelPatience = time.Second / 2  // with the other sentinels after one has answered
	sentinelInterval = 3 * time.Second  // of asking the sentinels while a connection stands
	minLife          = time.Second / 10 // of a pipeline, so that no server is dialled more often
	minStay          = time.Second      // of a connection to a server that does not serve
	maxQueued        = 8192             // operations that wait to be sent
	maxInFlight      = 512              // operations that wait for their replies
	maxFlush         = 64               // operations that are proved together
	slotCount        = 16384            // of a cluster
	maxRedirections  = 5                // of one operation
)

var (
	errClosed       = fmt.Errorf("%w: it is closed", errUnavailable)
	errQueueFull    = fmt.Errorf("%w: too many requests wait for Redis", errUnavailable)
	errNotConnected = fmt.Errorf("%w: cannot connect", errUnavailable)
	errReplyKind    = fmt.Errorf("%w: a reply of another kind than was asked for", errUnavailable)
	// errLost is the end of a connection before an operation was answered.
	errLost = fmt.Errorf("%w: connection lost", errUnavailable)
	// errTimeout is an operation, or a connection, that was not answered in time.
	errTimeout = fmt.Errorf("%w: no answer in time", errUnavailable)

	errOutOfStep  = errors.New("replies out of step")
	errNoPrimary  = errors.New("is no primary")
	errNotServing = errors.New("is no primary any more, or no node of its cluster")
	errReplaced   = errors.New("the sentinels name another primary")
	errNotNeeded  = errors.New("not needed")
)

// refusedError is what Redis said no with. It is an errRefused.
type refusedError struct {
	server string // host:port
	user   string // that is logged in, "" for the default one
	text   string // such as "OOM command not allowed when used memory > 'maxmemory'."
}

func (e *refusedError) Unwrap() error { return errRefused }

// Error leaves out what no log may hold: arguments such as session ids and passwords, which Redis quotes
// behind ", with args", and the name of the user.
func (e *refusedError) Error() string {
	text, _, _ := strings.Cut(e.text, ", with args")
	if e.user != "" {
		text = strings.ReplaceAll(text, "User "+e.user+" ", "User … ")
	}
	return e.server + ": " + text
}

// isRefusal tells whether err is what Redis refused with one of these words, such as "WRONGTYPE".
func isRefusal(err error, words ...string) bool {
	refusal, ok := errors.AsType[*refusedError](err)
	if !ok {
		return false
	}
	word, _, _ := strings.Cut(refusal.text, " ")
	return slices.Contains(words, word)
}

// command is a command's name and its arguments.
type command []any

// operation is some commands that are sent together, and what becomes of them.
type operation struct {
	commands []command
	begun    time.Time
	deadline time.Time  // past it nobody waits any more
	sends    int        // how often it may still be sent
	replies  []any      // one a command: nil, string, int64, []byte, []any, or redis.Error if refused
	done     chan error // with room for one
}

func newOperation(commands []command, sends int, deadline time.Time) *operation {
	return &operation{
		commands: commands,
		begun:    time.Now(),
		deadline: deadline,
		sends:    sends,
		done:     make(chan error, 1),
	}
}

// finish ends the operation, with nil when its replies are proved. Only the first call counts: the operation
// may have timed out.
func (op *operation) finish(err error) {
	select {
	case op.done <- err:
	default:
	}
}

func finishAll(operations []*operation, err error) {
	for _, op := range operations {
		op.finish(err)
	}
}

// firstError returns the first error among replies and, of EXEC's, their elements.
func firstError(replies []any) (text redis.Error, ok bool) {
	for _, reply := range replies {
		switch reply := reply.(type) {
		case redis.Error:
			return reply, true
		case []any:
			if text, ok := firstError(reply); ok {
				return text, true
			}
		}
	}
	return "", false
}

// pipeline sends operations to a server over one connection, which they share, and lives as long as that.
// Operations may come while it connects. One goroutine connects, sends, and ends the pipeline (run); another
// receives. Whoever takes an operation out of the queue sees to it that it is finished.
type pipeline struct {
	name    string   // host:port, by which the router knows a node; of the entry, REDIS_URL without the login
	isEntry bool     // of the router, and no node of a cluster
	addrs   []string // that dial is called with, the best first
	dial    func(ctx context.Context, addr string) (*redisConn, error)
	forget  func(*pipeline) // called just before the pipeline stops taking operations
	stats   *redisStats
	closing context.Context // ends when the store is closed
	wake    chan struct{}   // holds an element if the queue may have become longer

	mu    sync.Mutex
	queue []*operation
	conn  *redisConn // nil until there is one
	ended bool       // it takes no more operations
}

// do has an operation sent, and returns when it is answered or at its deadline. After an errTimeout
// nothing of the operation may be read: others may still write to it.
func (p *pipeline) do(op *operation) error {
	if err := p.enqueue(op); err != nil {
		return err
	}
	timer := time.AfterFunc(op.deadline.Sub(op.begun), func() { op.finish(p.timeout()) })
	defer timer.Stop()
	if err := <-op.done; err != nil {
		return err
	}
	if text, ok := firstError(op.replies); ok {
		return p.connection().refused(text)
	}
	return nil
}

func (p *pipeline) timeout() error {
	if p.connection() == nil {
		return fmt.Errorf("%w: %s: no connection stands yet", errTimeout, p.name)
	}
	return fmt.Errorf("%w: %s", errTimeout, p.name)
}

func (p *pipeline) enqueue(op *operation) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return p.lost()
	}
	if len(p.queue) >= maxQueued {
		return errQueueFull
	}
	p.queue = append(p.queue, op)
	p.stats.queued.Add(1)
	if len(p.queue) == 1 {
		select {
		case p.wake <- struct{}{}:
		default: // it holds an element already
		}
	}
	return nil
}

// lost returns the error for operations that were not sent before the end.
func (p *pipeline) lost() error { return fmt.Errorf("%w: %s", errLost, p.name) }

// connection returns the connection, also after it has ended, and nil before there is one.
func (p *pipeline) connection() *redisConn {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.conn
}

// leave ends the connection to a server that does not serve, once it is older than minStay. A lone read-only
// replica thus goes on serving reads: it is connected to anew once a second at most.
func (p *pipeline) leave() {
	conn := p.connection()
	time.AfterFunc(minStay-time.Since(conn.since), func() { conn.fail(errNotServing) })
}

// run is the life of a pipeline. The router forgets it before what is queued fails, so that a retry gets
// another one.
func (p *pipeline) run() {
	pause := time.After(minLife)
	conn, err := p.connect()
	if err == nil {
		p.serve(conn)
		err = p.lost()
	}
	select {
	case <-pause:
	case <-p.closing.Done():
	}
	p.forget(p)
	p.mu.Lock()
	p.ended = true
	p.mu.Unlock()
	finishAll(p.take(maxQueued), err)
}

// dialed is what came of one attempt to connect.
type dialed struct {
	conn *redisConn
	err  error
}

// connect returns the first connection to stand. It dials the best address, the next one when that fails, and
// all of them each attemptInterval. It fails when no attempt is left.
func (p *pipeline) connect() (*redisConn, error) {
	late := fmt.Errorf("%s: no connection within %v", p.name, connectTimeout)
	ctx, cancel := context.WithTimeoutCause(p.closing, connectTimeout, late)
	defer cancel() // ends the attempts that are left
	results := make(chan dialed)
	left := p.addrs // to be dialled for the first time
	attempts := 0   // in progress
	start := func(addr string) {
		attempts++
		go p.attempt(ctx, addr, results)
	}
	startNext := func() {
		if len(left) > 0 {
			start(left[0])
			left = left[1:]
		}
	}
	again := time.NewTicker(attemptInterval)
	defer again.Stop()
	var errs []error
	for startNext(); attempts > 0; {
		select {
		case result := <-results:
			if result.err == nil {
				return result.conn, nil
			}
			attempts--
			errs = append(errs, result.err)
			startNext()
		case <-again.C:
			left = nil
			for _, addr := range p.addrs {
				start(addr)
			}
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", errNotConnected, context.Cause(ctx))
		}
	}
	// %v, not %w: a refused login is no refusal of the operations that wait.
	return nil, fmt.Errorf("%w: %v", errNotConnected, errors.Join(errs...))
}

func (p *pipeline) attempt(ctx context.Context, addr string, results chan<- dialed) {
	p.stats.dials.Add(1)
	conn, err := p.dial(ctx, addr)
	select {
	case results <- dialed{conn, err}:
	case <-ctx.Done(): // another one was first, or time is up
		if err == nil {
			conn.fail(errNotNeeded)
		}
	}
}

// serve sends what is queued over conn until that ends.
func (p *pipeline) serve(conn *redisConn) {
	stop := context.AfterFunc(p.closing, func() { conn.fail(errClosed) })
	defer stop()
	p.mu.Lock()
	conn.since = time.Now()
	p.conn = conn
	p.mu.Unlock()
	go conn.receive()
	for {
		select {
		case <-p.wake:
		case <-conn.ended:
			return
		}
		runtime.Gosched() // requests that are ready to run join this flush
		for {
			operations := p.take(conn.waitForRoom())
			if len(operations) == 0 {
				break
			}
			if timely := p.dropLate(operations, conn.since); len(timely) > 0 {
				p.stats.flushes.Add(1)
				conn.send(timely)
			}
		}
	}
}

// take takes at most n operations out of the queue, the oldest first.
func (p *pipeline) take(n int) []*operation {
	p.mu.Lock()
	defer p.mu.Unlock()
	taken := p.queue[:min(n, len(p.queue))]
	p.stats.queued.Add(int64(-len(taken)))
	p.queue = append(make([]*operation, 0, len(p.queue)), p.queue[len(taken):]...)
	return taken
}

// dropLate finishes the operations that have waited for longer than they have left, and returns the others.
// An overloaded server would answer those too late. Waiting for the connection does not count.
func (p *pipeline) dropLate(operations []*operation, standsSince time.Time) []*operation {
	now := time.Now()
	return slices.DeleteFunc(operations, func(op *operation) bool {
		waited := min(now.Sub(op.begun), now.Sub(standsSince))
		late := waited > op.deadline.Sub(now)
		if late {
			op.finish(fmt.Errorf("%w: %s: too many requests were before it", errTimeout, p.name))
		}
		return late
	})
}

// redisConn is a connection, and what is in flight on it: sent, and not answered yet.
type redisConn struct {
	server string // host:port
	user   string // that is logged in, "" for the default one
	socket net.Conn
	redis  redis.Conn    // encodes commands into the socket, and reads replies from it
	since  time.Time     // in use
	nonce  string        // never used before; each flush adds its number
	ended  chan struct{} // closed when err is set

	mu         sync.Mutex
	flushes    int      // so far
	inFlight   []*flush // the oldest first
	operations int      // in all of them
	roomier    sync.Cond
	err        error // why the connection ended: an errLost or an errTimeout
}

// flush is a batch of operations that are sent together. It ends in an ECHO of a nonce, and no reply counts
// unless that comes back in its place: a connection that is one reply out of step would hand each client the
// session of another. The order of replies within a flush is trusted.
type flush struct {
	operations []*operation
	commands   int // of all operations
	nonce      string
}

// newRedisConn returns a connection over stream, which is socket or TLS over it.
func newRedisConn(server, user string, socket, stream net.Conn) *redisConn {
	c := &redisConn{
		server: server,
		user:   user,
		socket: socket,
		redis:  redis.NewConn(redigoConn{stream}, 0, 0),
		nonce:  rand.Text(),
		ended:  make(chan struct{}),
	}
	c.roomier.L = &c.mu
	return c
}

// redigoConn is the connection as redigo has it. Close does nothing: fail closes the socket, without waiting
// for TLS to say goodbye. SetReadDeadline does nothing: redigo would clear our deadline before each reply.
type redigoConn struct {
	net.Conn
}

func (redigoConn) Close() error                    { return nil }
func (redigoConn) SetReadDeadline(time.Time) error { return nil }

// do sends a command and returns its reply, while the connection is being made.
func (c *redisConn) do(name string, args ...any) (any, error) {
	reply, err := c.redis.Do(name, args...)
	if text, ok := errors.AsType[redis.Error](err); ok {
		err = c.refused(text)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return reply, nil
}

// refused returns the error for what the server has refused.
func (c *redisConn) refused(text redis.Error) error {
	return &refusedError{server: c.server, user: c.user, text: string(text)}
}

// waitForRoom waits until more operations may be in flight, and returns how many in one flush: 0 when the
// connection has ended. The bounds let a slow server prove a flush within proofTimeout, and answer in time.
func (c *redisConn) waitForRoom() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.operations >= maxInFlight && c.err == nil {
		c.roomier.Wait()
	}
	if c.err != nil {
		return 0
	}
	return min(maxInFlight-c.operations, maxFlush)
}

// send sends operations as a flush. Only one goroutine may call it.
func (c *redisConn) send(operations []*operation) {
	f := c.putInFlight(operations)
	if f == nil {
		finishAll(operations, fmt.Errorf("%w: %s", errLost, c.server))
		return
	}
	for _, op := range operations {
		for _, cmd := range op.commands {
			c.redis.Send(cmd[0].(string), cmd[1:]...) // an error shows in Flush
		}
	}
	c.redis.Send("ECHO", f.nonce)
	if err := c.redis.Flush(); err != nil {
		c.fail(err)
	}
}

// putInFlight makes a flush, whose operations the receiver finishes. It is nil when the connection has ended.
func (c *redisConn) putInFlight(operations []*operation) *flush {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return nil
	}
	if len(c.inFlight) == 0 {
		c.socket.SetDeadline(time.Now().Add(proofTimeout)) // for writing, too
	}
	c.flushes++
	f := &flush{operations: operations, nonce: c.nonce + strconv.Itoa(c.flushes)}
	for _, op := range operations {
		op.sends--
		f.commands += len(op.commands)
	}
	c.inFlight = append(c.inFlight, f)
	c.operations += len(operations)
	return f
}

// receive receives the replies to what was sent until the connection ends, and then finishes what is in
// flight with the error.
func (c *redisConn) receive() {
	var err error
	for err == nil {
		err = c.receiveFlush()
	}
	c.fail(err)
	for _, f := range c.inFlight { // nothing is put there any more
		finishAll(f.operations, c.err)
	}
}

// receiveFlush receives the replies to the oldest flush and its proof, and then hands them to the operations.
// It reads when nothing is in flight, too, so a server that hangs up is noticed at once.
func (c *redisConn) receiveFlush() error {
	first, err := c.receiveReply()
	if err != nil {
		return err
	}
	f := c.oldest()
	if f == nil {
		return errOutOfStep // nobody has asked for the reply
	}
	replies := append(make([]any, 0, f.commands+1), first)
	for len(replies) <= f.commands {
		reply, err := c.receiveReply()
		if err != nil {
			return err
		}
		replies = append(replies, reply)
	}
	if err := c.completeFlush(f, replies[f.commands]); err != nil {
		return err
	}
	for _, op := range f.operations {
		op.replies = replies[:len(op.commands)]
		replies = replies[len(op.commands):]
		op.finish(nil)
	}
	return nil
}

// receiveReply returns the next reply. What Redis refused is a reply, a redis.Error.
func (c *redisConn) receiveReply() (any, error) {
	reply, err := c.redis.Receive()
	if text, ok := err.(redis.Error); ok {
		return text, nil
	}
	return reply, err
}

func (c *redisConn) oldest() *flush {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.inFlight) == 0 {
		return nil
	}
	return c.inFlight[0]
}

// completeFlush takes the oldest flush out of flight if the reply to its ECHO proves it, and gives the next
// one proofTimeout from now.
func (c *redisConn) completeFlush(f *flush, proof any) error {
	if text, ok := proof.(redis.Error); ok {
		return fmt.Errorf("ECHO: %v", c.refused(text)) // %v: not proved, so it refuses no operation
	}
	if nonce, ok := proof.([]byte); !ok || string(nonce) != f.nonce {
		return errOutOfStep
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	c.inFlight = c.inFlight[1:]
	c.operations -= len(f.operations)
	c.roomier.Signal()
	var deadline time.Time // none
	if len(c.inFlight) > 0 {
		deadline = time.Now().Add(proofTimeout)
	}
	c.socket.SetDeadline(deadline)
	return nil
}

// isOpen tells whether the connection has not ended.
func (c *redisConn) isOpen() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err == nil
}

// fail ends the connection. Every connection ends here, and the first error wins.
func (c *redisConn) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	kind := errLost
	if errors.Is(err, os.ErrDeadlineExceeded) {
		kind = errTimeout
	}
	c.err = fmt.Errorf("%w: %s: %w", kind, c.server, err)
	c.socket.Close()
	c.roomier.Signal()
	close(c.ended)
}

// redisDialer connects to the servers of a target.
type redisDialer struct {
	target  *redisTarget
	dialTCP func(ctx context.Context, network, addr string) (net.Conn, error)
}

// dialServer connects to a server, logs in and has it answer.
func (d *redisDialer) dialServer(ctx context.Context, addr string) (*redisConn, error) {
	return d.open(ctx, addr, func(conn *redisConn) error {
		if err := d.logIn(conn); err != nil {
			return err
		}
		return echo(conn)
	})
}

// dialNode connects to a node of a cluster. A standalone Redis may have taken its address: it refuses ASKING.
func (d *redisDialer) dialNode(ctx context.Context, addr string) (*redisConn, error) {
	return d.open(ctx, addr, func(conn *redisConn) error {
		if err := d.logIn(conn); err != nil {
			return err
		}
		if _, err := conn.do("ASKING"); err != nil {
			return err
		}
		return echo(conn)
	})
}

// dialPrimary connects to the primary that the sentinels name. While they do not agree, several are tried.
func (d *redisDialer) dialPrimary(ctx context.Context) (*redisConn, error) {
	candidates, err := d.askSentinels(ctx)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, candidate := range candidates {
		conn, err := d.dialIfPrimary(ctx, candidate.addr)
		if err == nil {
			return conn, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// dialIfPrimary connects to the server that sentinels call the primary, if it is one.
func (d *redisDialer) dialIfPrimary(ctx context.Context, addr string) (*redisConn, error) {
	conn, err := d.open(ctx, addr, func(conn *redisConn) error {
		if err := d.logIn(conn); err != nil {
			return err
		}
		role, err := redis.Values(conn.do("ROLE"))
		if err != nil {
			return err
		}
		if len(role) == 0 || fmt.Sprintf("%s", role[0]) != "master" {
			return errNoPrimary
		}
		return echo(conn)
	})
	if err != nil {
		return nil, fmt.Errorf("the primary that the sentinels name: %w", err)
	}
	return conn, nil
}

// logIn logs in and selects the database. It is not left to redigo's dialling, which ignores a user without a
// password.
func (d *redisDialer) logIn(conn *redisConn) error {
	var login []any
	if d.target.user != "" {
		login = append(login, d.target.user)
	}
	if d.target.user != "" || d.target.password != "" {
		if _, err := conn.do("AUTH", append(login, d.target.password)...); err != nil {
			return err
		}
	}
	if d.target.database != 0 {
		if _, err := conn.do("SELECT", d.target.database); err != nil {
			return err
		}
	}
	return nil
}

// echo has a server answer before its connection is used.
func echo(conn *redisConn) error {
	text, err := redis.String(conn.do("ECHO", conn.nonce))
	if err == nil && text != conn.nonce {
		return errOutOfStep
	}
	return err
}

// candidate is a server that sentinels call the primary.
type candidate struct {
	addr  string
	votes int // of sentinels
}

// sentinelAnswer is what a sentinel says.
type sentinelAnswer struct {
	primary string // host:port
	err     error
}

// askSentinels returns the servers that the sentinels call the primary, the one with the most votes first: a
// sentinel that a partition cuts off from the others names an old one. An error means that no sentinel has
// answered before ctx ended.
func (d *redisDialer) askSentinels(ctx context.Context) ([]candidate, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the wait for those that are late
	answers := make(chan sentinelAnswer, len(d.target.addrs))
	for _, sentinel := range d.target.addrs {
		go func() { answers <- d.askSentinel(ctx, sentinel) }()
	}
	votes, errs := collectVotes(answers, len(d.target.addrs))
	if len(votes) == 0 {
		return nil, errors.Join(errs...)
	}
	var candidates []candidate
	for addr, n := range votes {
		candidates = append(candidates, candidate{addr, n})
	}
	slices.SortFunc(candidates, func(a, b candidate) int { return cmp.Compare(b.votes, a.votes) })
	return candidates, nil
}

// collectVotes counts n answers, or those that have come sentinelPatience after the latest good one.
func collectVotes(answers <-chan sentinelAnswer, n int) (votes map[string]int, errs []error) {
	votes = map[string]int{}
	var enough <-chan time.Time
	for range n {
		select {
		case answer := <-answers:
			if answer.err != nil {
				errs = append(errs, answer.err)
				continue
			}
			votes[answer.primary]++
			enough = time.After(sentinelPatience)
		case <-enough:
			return votes, errs
		}
	}
	return votes, errs
}

// askSentinel asks one sentinel. It is told the password only when it asks for one.
func (d *redisDialer) askSentinel(ctx context.Context, sentinel string) (answer sentinelAnswer) {
	conn, err := d.open(ctx, sentinel, func(conn *redisConn) error {
		addr, err := redis.Strings(conn.do("SENTINEL", "get-master-addr-by-name", d.target.primary))
		if isRefusal(err, "NOAUTH") && d.target.password != "" {
			if _, err := conn.do("AUTH", d.target.password); err != nil {
				return err
			}
			addr, err = redis.Strings(conn.do("SENTINEL", "get-master-addr-by-name", d.target.primary))
		}
		if errors.Is(err, redis.ErrNil) {
			return fmt.Errorf("knows no primary %q", d.target.primary)
		}
		if err == nil && len(addr) != 2 {
			return errReplyKind
		}
		if err == nil {
			answer.primary = net.JoinHostPort(addr[0], addr[1])
		}
		return err
	})
	if err != nil {
		return sentinelAnswer{err: fmt.Errorf("sentinel %w", err)}
	}
	conn.fail(errNotNeeded)
	return answer
}

// open opens a connection and has greet talk to the server, until ctx ends.
func (d *redisDialer) open(
	ctx context.Context, addr string, greet func(*redisConn) error,
) (*redisConn, error) {
	socket, err := d.dialTCP(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", addr, err)
	}
	past := time.Unix(1, 0)
	stop := context.AfterFunc(ctx, func() { socket.SetDeadline(past) })
	stream := socket
	if d.target.scheme == "rediss" { // its handshake comes with the first command
		stream = tls.Client(socket, &tls.Config{ServerName: d.certificateName(addr)})
	}
	conn := newRedisConn(addr, d.target.user, socket, stream)
	err = greet(conn)
	if !stop() {
		err = ctx.Err()
	}
	if err != nil {
		conn.fail(err)
		return nil, fmt.Errorf("%s: %w", addr, err)
	}
	return conn, nil
}

// certificateName returns the name or the IP address that a server's certificate has to be for. A cluster
// announces its nodes by IP address unless it is told otherwise: such a node has the name in REDIS_URL.
func (d *redisDialer) certificateName(addr string) string {
	host, _, _ := net.SplitHostPort(addr)
	if !isIP(host) || slices.Contains(d.target.addrs, addr) {
		return host
	}
	for _, known := range d.target.addrs {
		if name, _, _ := net.SplitHostPort(known); !isIP(name) {
			return name
		}
	}
	return host
}

func isIP(host string) bool {
	_, err := netip.ParseAddr(host)
	return err == nil
}

// redisTarget is where sessions are, as REDIS_URL says it.
type redisTarget struct {
	scheme   string   // redis, rediss or redis-sentinel
	addrs    []string // host:port of each server, or of each sentinel
	primary  string   // its name, "" without sentinels
	user     string   // "" for the default user; without a password too there is no login
	password string
	database int
}

const redisURLForms = "redis://[[user]:password@]host[:port][,host[:port]…][/database], " +
	"rediss://… the same over TLS, or " +
	"redis-sentinel://[[user]:password@]host[:port][,host[:port]…]/primary[/database], " +
	"with special characters percent-encoded"

// parseRedisURL reads a URL of one of redisURLForms. Its errors tell nothing of the text: it may hold a
// password.
func parseRedisURL(text string) (*redisTarget, error) {
	scheme, rest, _ := strings.Cut(text, "://")
	sentinels := scheme == "redis-sentinel"
	if scheme != "redis" && scheme != "rediss" && !sentinels {
		return nil, errors.New("the scheme is none of these")
	}
	authority, path, _ := strings.Cut(rest, "/")
	t := &redisTarget{scheme: scheme}
	if err := t.parseAuthority(authority); err != nil {
		return nil, err
	}
	database := path
	if sentinels {
		var name string
		name, database, _ = strings.Cut(path, "/")
		primary, err := url.PathUnescape(name)
		if err != nil || primary == "" || strings.ContainsAny(name, "?#@") {
			return nil, errors.New("the primary's name is missing or malformed")
		}
		t.primary = primary
	}
	if database != "" {
		n, err := strconv.ParseUint(database, 10, 31)
		if err != nil {
			return nil, errors.New("the database is no whole number")
		}
		t.database = int(n)
	}
	return t, nil
}

// parseAuthority reads login and hosts. As net/url takes one host, each is parsed with the login.
func (t *redisTarget) parseAuthority(authority string) error {
	login := ""
	hosts := authority
	if before, after, ok := strings.Cut(authority, "@"); ok {
		login = before + "@"
		hosts = after
	}
	if login != "" && !strings.Contains(login, ":") || strings.Contains(hosts, "@") {
		return errors.New("a login is user:password@ or :password@")
	}
	for host := range strings.SplitSeq(hosts, ",") {
		u, err := url.Parse("redis://" + login + host)
		if err != nil || u.RawQuery != "" || u.Fragment != "" || u.ForceQuery {
			return errors.New("it is no such URL")
		}
		addr, err := redisAddr(u, t.scheme == "redis-sentinel")
		if err != nil {
			return err
		}
		t.addrs = append(t.addrs, addr)
		t.user = u.User.Username()
		t.password, _ = u.User.Password()
	}
	return nil
}

// redisAddr returns the URL's host:port, with the default port where there is none.
func redisAddr(u *url.URL, sentinel bool) (string, error) {
	if u.Hostname() == "" {
		return "", errors.New("a host is missing")
	}
	if strings.Count(u.Host, ":") > 1 && !strings.HasPrefix(u.Host, "[") {
		return "", errors.New("an IPv6 address stands in brackets")
	}
	port := u.Port()
	if port == "" && sentinel {
		port = "26379"
	} else if port == "" {
		port = "6379"
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return "", errors.New("a port is not from 1 to 65535")
	}
	return net.JoinHostPort(u.Hostname(), port), nil
}

// String returns the URL without the login.
func (t *redisTarget) String() string {
	hosts := strings.ReplaceAll(strings.Join(t.addrs, ","), "%", "%25") // of an IPv6 zone
	text := t.scheme + "://" + hosts
	if t.primary != "" {
		text += "/" + url.PathEscape(t.primary)
	}
	if t.database != 0 || t.primary == "" {
		text += "/" + strconv.Itoa(t.database)
	}
	return text
}

// router finds the pipeline to ask for a key: the entry, or where Redis is a cluster the node that has the
// key's slot. It learns a slot's node from Redis's redirections, and forgets a node's
// slots when the connection to it ends. Keys of unknown slots go to the entry.
// https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/
type router struct {
	dialer  *redisDialer
	log     *slog.Logger
	stats   redisStats
	closing context.Context
	close   context.CancelCauseFunc

	mu        sync.Mutex
	entry     *pipeline            // to a server of REDIS_URL, or a node; nil until it is needed
	avoided   string               // the server that was left last: the entry is dialled there last
	nodes     map[string]*pipeline // by host:port
	slots     [slotCount]*pipeline // the node of each slot that is known
	isCluster bool                 // a server has redirected
}

func newRouter(dialer *redisDialer, log *slog.Logger) *router {
	r := &router{dialer: dialer, log: log, nodes: map[string]*pipeline{}}
	r.closing, r.close = context.WithCancelCause(context.Background())
	if dialer.target.primary != "" {
		go r.followPrimary()
	}
	return r
}

// do sends commands on a key to the server that has it, at most sends times, and returns a reply for each.
// ctx's deadline is kept. Cancelling ctx does nothing: watching for that would cost more than a lookup takes.
func (r *router) do(ctx context.Context, key string, sends int, commands ...command) ([]any, error) {
	r.stats.operations.Add(1)
	deadline := time.Now().Add(operationTimeout)
	if end, ok := ctx.Deadline(); ok && end.Before(deadline) {
		deadline = end
	}
	server := r.serverOf(key)
	toSend := commands
	cause := fmt.Errorf("%w: more than %d redirections", errUnavailable, maxRedirections)
	for range 1 + maxRedirections {
		op := newOperation(toSend, sends, deadline)
		err := server.do(op)
		if err == nil {
			return op.replies[len(toSend)-len(commands):], nil
		}
		if !isRefusal(err, "MOVED", "ASK") {
			cause = err // others may go on redirecting to this server
		}
		next, asking := r.next(key, server, op, err)
		if next == nil {
			return nil, err
		}
		if errors.Is(err, errLost) {
			sends = op.sends // what was refused and redirected was not done
		}
		server = next
		toSend = commands
		if asking {
			toSend = slices.Concat([]command{{"ASKING"}}, commands)
		}
	}
	return nil, cause
}

// next returns the pipeline that an operation goes to after an error, nil for none, and whether ASKING goes
// before it.
func (r *router) next(key string, from *pipeline, op *operation, err error) (to *pipeline, asking bool) {
	refusal, isRefused := errors.AsType[*refusedError](err)
	switch {
	case errors.Is(err, errClosed): // there will be no other
	case errors.Is(err, errTimeout): // the server is slow enough without a second try
		if !from.isEntry {
			r.unlearn(from)
		}
	case errors.Is(err, errLost) && op.sends > 0:
		r.stats.retries.Add(1)
		return r.serverOf(key), false
	case errors.Is(err, errNotConnected) && !from.isEntry:
		return r.serverOf(key), false
	case isRefused:
		return r.redirect(key, from, refusal)
	}
	return nil, false
}

// redirect is next after a refusal. Redis redirects before it executes anything, so what it redirects may be
// sent again, even a creation.
func (r *router) redirect(key string, from *pipeline, refusal *refusedError) (to *pipeline, asking bool) {
	word, slot, addr := parseRedirection(refusal)
	switch {
	case word == "MOVED":
		r.stats.redirections.Add(1)
		to := r.moved(slot, addr)
		if to == from { // the address may stand for several machines
			to.connection().fail(errNotServing)
		}
		return to, false
	case word == "ASK":
		r.stats.redirections.Add(1)
		return r.asked(addr), true
	case isRefusal(refusal, "CLUSTERDOWN") && !from.isEntry: // it may have left the cluster
		r.unlearn(from)
		return r.serverOf(key), false
	case isRefusal(refusal, "READONLY", "MASTERDOWN", "CLUSTERDOWN"):
		from.leave()
	}
	return nil, false
}

// ping asks the entry and all connected nodes, and returns nil when one of them answers.
func (r *router) ping(ctx context.Context) error {
	r.mu.Lock()
	nodes := r.connectedNodes()
	r.mu.Unlock()
	answers := make(chan error, 1+len(nodes))
	go func() {
		_, err := r.do(ctx, "", sendAgain)
		answers <- err
	}()
	for _, node := range nodes {
		go func() {
			deadline := time.Now().Add(operationTimeout)
			answers <- node.do(newOperation(nil, sendOnce, deadline))
		}()
	}
	var err error
	for range 1 + len(nodes) {
		if err = <-answers; err == nil {
			return nil
		}
	}
	return err
}

// serverOf returns the pipeline to ask for a key, for "" the entry.
func (r *router) serverOf(key string) *pipeline {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.nodes) > 0 && key != "" {
		if node := r.slots[slotOf(key)]; node != nil {
			return node
		}
	}
	if r.entry == nil {
		r.entry = r.start(r.newEntry())
	}
	return r.entry
}

// newEntry returns a pipeline to one of the servers in REDIS_URL, or of the nodes that stand. The caller
// holds r.mu.
func (r *router) newEntry() *pipeline {
	target := r.dialer.target
	entry := &pipeline{name: target.String(), isEntry: true}
	if target.primary != "" {
		entry.addrs = []string{target.primary}
		entry.dial = func(ctx context.Context, _ string) (*redisConn, error) {
			return r.dialer.dialPrimary(ctx)
		}
		return entry
	}
	entry.dial = r.dialer.dialServer
	entry.addrs = slices.Clone(target.addrs)
	for _, node := range r.connectedNodes() {
		if !slices.Contains(entry.addrs, node.name) {
			entry.addrs = append(entry.addrs, node.name)
		}
	}
	if i := slices.Index(entry.addrs, r.avoided); i >= 0 {
		entry.addrs = slices.Concat(entry.addrs[i+1:], entry.addrs[:i+1])
	}
	return entry
}

// start starts a pipeline. The caller holds r.mu.
func (r *router) start(p *pipeline) *pipeline {
	p.forget = r.forget
	p.stats = &r.stats
	p.closing = r.closing
	p.wake = make(chan struct{}, 1)
	go p.run()
	return p
}

// connectedNodes returns the nodes with a connection, in the order of their addresses. The caller holds r.mu.
func (r *router) connectedNodes() []*pipeline {
	var standing []*pipeline
	for _, addr := range slices.Sorted(maps.Keys(r.nodes)) {
		conn := r.nodes[addr].connection()
		if conn != nil && conn.isOpen() {
			standing = append(standing, r.nodes[addr])
		}
	}
	return standing
}

// moved notes the node of a slot, as another server told it, and returns it.
func (r *router) moved(slot int, addr string) *pipeline {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.slots[slot] = r.node(addr)
	return r.slots[slot]
}

// asked returns the node that is about to take over a slot.
func (r *router) asked(addr string) *pipeline {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.node(addr)
}

// node returns the pipeline to a node. The caller holds r.mu.
func (r *router) node(addr string) *pipeline {
	if !r.isCluster {
		r.isCluster = true
		r.log.Info("Redis is a cluster", "node", addr)
	}
	if r.nodes[addr] == nil {
		r.nodes[addr] = r.start(&pipeline{name: addr, addrs: []string{addr}, dial: r.dialer.dialNode})
	}
	return r.nodes[addr]
}

// unlearn drops what is known of a node's slots.
func (r *router) unlearn(node *pipeline) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.clearSlots(node)
}

// clearSlots is unlearn for who holds r.mu.
func (r *router) clearSlots(p *pipeline) {
	for slot, node := range r.slots[:] {
		if node == p {
			r.slots[slot] = nil
		}
	}
}

// forget drops a pipeline that is about to end. An entry's server that hung, or that was left, is avoided.
func (r *router) forget(p *pipeline) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.entry == p {
		r.entry = nil
		if p.conn != nil && (errors.Is(p.conn.err, errTimeout) || errors.Is(p.conn.err, errNotServing)) {
			r.avoided = p.conn.server
		}
	}
	if r.nodes[p.name] == p {
		delete(r.nodes, p.name)
	}
	r.clearSlots(p)
}

// followPrimary asks the sentinels again and again. When they name another primary, which answers as one, the
// connection to the old one ends: behind a partition that may still take writes (split brain).
func (r *router) followPrimary() {
	again := time.NewTicker(sentinelInterval)
	defer again.Stop()
	for {
		select {
		case <-again.C:
		case <-r.closing.Done():
			return
		}
		r.mu.Lock()
		entry := r.entry
		r.mu.Unlock()
		if entry == nil {
			continue
		}
		if conn := entry.connection(); conn != nil {
			r.checkStillPrimary(conn)
		}
	}
}

// checkStillPrimary takes a majority of all sentinels for their word. A failover needs one, too.
func (r *router) checkStillPrimary(conn *redisConn) {
	ctx, cancel := context.WithTimeout(r.closing, sentinelInterval)
	defer cancel()
	candidates, err := r.dialer.askSentinels(ctx)
	if err != nil {
		return // as long as the connection stands the sentinels are not needed
	}
	named := candidates[0]
	if named.addr == conn.server || named.votes <= len(r.dialer.target.addrs)/2 {
		return
	}
	other, err := r.dialer.dialIfPrimary(ctx, named.addr)
	if err == nil {
		other.fail(errNotNeeded)
		conn.fail(errReplaced)
	}
}

// slotOf returns the slot of a key without braces: its CRC16 (XMODEM).
func slotOf(key string) int {
	var crc uint16
	for i := range len(key) {
		crc ^= uint16(key[i]) << 8
		for range 8 {
			carry := crc&0x8000 != 0
			crc <<= 1
			if carry {
				crc ^= 0x1021
			}
		}
	}
	return int(crc % slotCount)
}

// parseRedirection reads "MOVED 3999 127.0.0.1:6381" or "ASK …". Without a host it is the one of the server
// that says so. Another refusal has no kind.
func parseRedirection(refusal *refusedError) (kind string, slot int, addr string) {
	words := strings.Fields(refusal.text)
	if len(words) != 3 || words[0] != "MOVED" && words[0] != "ASK" {
		return "", 0, ""
	}
	slot, err := strconv.Atoi(words[1])
	colon := strings.LastIndexByte(words[2], ':') // an IPv6 address has no brackets here
	if err != nil || slot < 0 || slot >= slotCount || colon < 0 {
		return "", 0, ""
	}
	host := words[2][:colon]
	if host == "" || host == "?" {
		host, _, _ = net.SplitHostPort(refusal.server)
	}
	return words[0], slot, net.JoinHostPort(host, words[2][colon+1:])
}
