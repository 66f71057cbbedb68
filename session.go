// Sessions: what a session backend promises, session ids and times, and the Redis backend.

package main

import (
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
// Every method may be called from any goroutine and gives up within 3 s, but for a commit that has begun.
// "There is no such session" (errNoSession) signs a user out. "I could not find out" must not: it is an
// error that wraps errUnavailable.
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
	// errRefused is an errUnavailable: the store was reached, and said no.
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

// How often an operation may be sent. What only reads or deletes is sent once more where the connection ended
// before the answer. A creation is not: a first one that arrives late could bring the session back after its
// DEL.
const (
	sendOnce  = 1
	sendAgain = 2
)

// Create makes the session in one transaction on one key. So none can be left without an end.
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

// checkCreated looks at EXEC's reply, of which do has found no element to be an error.
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
	sentinelTimeout  = time.Second / 2  // asking one sentinel
	sentinelInterval = 3 * time.Second  // of asking the sentinels while a connection stands
	attemptInterval  = time.Second      // between attempts to connect while none has succeeded
	minLife          = time.Second / 10 // of a pipeline, so that no server is dialled more often
	minStay          = time.Second      // at a server, before another is looked for
	maxQueued        = 8192             // operations that wait to be sent
	maxInFlight      = 512              // operations that wait for their replies
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

	errOutOfStep = errors.New("replies out of step")
	errNoPrimary = errors.New("is no primary")
	errLeft      = errors.New("left for another server")
	errReplaced  = errors.New("the sentinels name another primary")
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
		replies:  make([]any, 0, len(commands)),
		done:     make(chan error, 1),
	}
}

// isLate tells whether the operation has waited for longer than it has left. Such a one is not sent any more:
// an overloaded Redis would answer it too late.
func (op *operation) isLate(now time.Time) bool {
	return now.Sub(op.begun) > op.deadline.Sub(now)
}

// finish ends the operation, with nil when its replies are proved. Nothing comes of it after a time-out.
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

// refusal returns the first error among replies and, of EXEC's, their elements.
func refusal(replies []any) (redis.Error, bool) {
	for _, reply := range replies {
		switch reply := reply.(type) {
		case redis.Error:
			return reply, true
		case []any:
			if text, ok := refusal(reply); ok {
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
	name     string // of the server, for messages
	isEntry  bool   // of the router, and no node of a cluster
	patience time.Duration
	dial     func(ctx context.Context, attempt int) (*redisConn, error)
	forget   func(*pipeline) // called before the pipeline takes no more operations
	stats    *redisStats
	closing  context.Context // ends when the store is closed
	wake     chan struct{}   // holds an element if the queue may have become longer

	mu    sync.Mutex
	queue []*operation
	conn  *redisConn // nil until there is one
	ended bool       // it takes no more operations
}

// do has an operation sent, and returns when it is answered or at its deadline. After an errTimeout nothing of
// the operation may be read: it may yet be sent.
func (p *pipeline) do(op *operation) error {
	if err := p.enqueue(op); err != nil {
		return err
	}
	timer := time.AfterFunc(op.deadline.Sub(op.begun), func() { op.finish(p.timeout()) })
	defer timer.Stop()
	if err := <-op.done; err != nil {
		return err
	}
	return p.refused(op.replies)
}

func (p *pipeline) timeout() error {
	if p.standing() == nil {
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

// standing returns the connection, nil if none stands.
func (p *pipeline) standing() *redisConn {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.conn == nil || p.conn.hasEnded() {
		return nil
	}
	return p.conn
}

// leave ends the connection if it is older than age.
func (p *pipeline) leave(age time.Duration) {
	if conn := p.standing(); conn != nil && time.Since(conn.since) > age {
		conn.fail(errLeft)
	}
}

// refused returns a refusedError if Redis refused anything of an operation.
func (p *pipeline) refused(replies []any) error {
	text, ok := refusal(replies)
	if !ok {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.conn.refused(text)
}

// run is the life of a pipeline.
func (p *pipeline) run() {
	grownUp := time.After(minLife)
	conn, err := p.connect()
	if err == nil {
		p.serve(conn)
		err = p.lost()
	} else {
		finishAll(p.take(maxQueued), err)
	}
	select {
	case <-grownUp:
	case <-p.closing.Done():
	}
	p.forget(p) // first, so that whoever is told of the end finds another pipeline
	p.mu.Lock()
	p.ended = true
	p.mu.Unlock()
	finishAll(p.take(maxQueued), err)
}

// connect makes one attempt, and another each attemptInterval, and returns the first connection to stand. It
// fails with the latest error when no attempt is left.
func (p *pipeline) connect() (*redisConn, error) {
	late := fmt.Errorf("%s: no connection within %v", p.name, p.patience)
	ctx, cancel := context.WithTimeoutCause(p.closing, p.patience, late)
	defer cancel() // ends the attempts that are left
	attempts := make(chan attempt)
	started := 0
	start := func() {
		go p.attempt(ctx, started, attempts)
		started++
	}
	start()
	next := time.NewTicker(attemptInterval)
	defer next.Stop()
	failed := 0
	for {
		select {
		case a := <-attempts:
			if a.err == nil {
				return a.conn, nil
			}
			failed++
			if failed == started {
				// %v: what a server refuses at login is no refusal of what waits.
				return nil, fmt.Errorf("%w: %v", errNotConnected, a.err)
			}
		case <-next.C:
			start()
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", errNotConnected, context.Cause(ctx))
		}
	}
}

// attempt is what came of one attempt to connect.
type attempt struct {
	conn *redisConn
	err  error
}

func (p *pipeline) attempt(ctx context.Context, number int, attempts chan<- attempt) {
	p.stats.dials.Add(1)
	conn, err := p.dial(ctx, number)
	select {
	case attempts <- attempt{conn, err}:
	case <-ctx.Done(): // another one was first, or time is up
		if err == nil {
			conn.fail(errLeft)
		}
	}
}

// serve sends what is queued over conn until that ends.
func (p *pipeline) serve(conn *redisConn) {
	stop := context.AfterFunc(p.closing, func() { conn.fail(errClosed) })
	defer stop()
	p.mu.Lock()
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
			operations := p.take(conn.room())
			if len(operations) == 0 {
				break
			}
			p.stats.flushes.Add(1)
			conn.send(p.dropLate(operations))
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

// dropLate finishes the operations that are too late to be sent, and returns the others.
func (p *pipeline) dropLate(operations []*operation) []*operation {
	now := time.Now()
	return slices.DeleteFunc(operations, func(op *operation) bool {
		late := op.isLate(now)
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
	place  int    // of its address in the list that was dialled
	socket net.Conn
	redis  redis.Conn // encodes commands into the socket, and reads replies from it
	since  time.Time
	nonce  string        // never used before; each flush adds its number
	ended  chan struct{} // closed when err is set

	mu         sync.Mutex
	flushes    int      // so far
	inFlight   []*flush // the oldest first
	operations int      // in all of them
	roomier    sync.Cond
	err        error // why the connection ended: an errLost or an errTimeout
}

// flush is a batch of operations that are sent together. It ends in an ECHO of a nonce: unless that comes
// back in its place none of the replies is believed. A connection that is a single reply out of step would
// hand each client the session of the one before it. The order of replies within a flush is trusted.
type flush struct {
	operations []*operation
	nonce      string
}

// newRedisConn returns a connection over stream, which is socket or TLS over it.
func newRedisConn(server, user string, socket, stream net.Conn) *redisConn {
	c := &redisConn{
		server: server,
		user:   user,
		socket: socket,
		redis:  redis.NewConn(heldConn{stream}, 0, 0),
		since:  time.Now(),
		nonce:  rand.Text(),
		ended:  make(chan struct{}),
	}
	c.roomier.L = &c.mu
	return c
}

// heldConn keeps two things from redigo: closing, which under TLS waits to say goodbye, and the deadline for
// reading, which redigo clears before each reply.
type heldConn struct {
	net.Conn
}

func (heldConn) Close() error                    { return nil }
func (heldConn) SetReadDeadline(time.Time) error { return nil }

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

// room waits until more operations may be in flight, and returns how many: 0 when the connection has ended.
// The bound lets a slow server prove something within proofTimeout.
func (c *redisConn) room() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.operations >= maxInFlight && c.err == nil {
		c.roomier.Wait()
	}
	if c.err != nil {
		return 0
	}
	return maxInFlight - c.operations
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
	for _, op := range operations {
		op.sends--
	}
	c.flushes++
	f := &flush{operations: operations, nonce: c.nonce + strconv.Itoa(c.flushes)}
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

// receiveFlush receives the replies to the oldest flush and its proof, and finishes its operations. It reads
// when nothing is in flight, too, so a server that hangs up is noticed at once.
func (c *redisConn) receiveFlush() error {
	reply, err := c.receiveReply()
	if err != nil {
		return err
	}
	f := c.oldest()
	if f == nil {
		return errOutOfStep // nobody has asked for the reply
	}
	for _, op := range f.operations {
		for range op.commands {
			op.replies = append(op.replies, reply)
			if reply, err = c.receiveReply(); err != nil {
				return err
			}
		}
	}
	if err := c.prove(f, reply); err != nil {
		return err
	}
	finishAll(f.operations, nil)
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

// prove takes the oldest flush out of flight if the reply to its ECHO proves it, and gives the next one
// proofTimeout from now.
func (c *redisConn) prove(f *flush, proof any) error {
	if nonce, ok := proof.([]byte); !ok || string(nonce) != f.nonce {
		return c.explain(f, proof)
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

// explain returns why a flush is not proved. Redis may have refused the ECHO, or an EXEC: then the ECHO was
// queued in its transaction.
func (c *redisConn) explain(f *flush, proof any) error {
	replies := []any{proof}
	for _, op := range f.operations {
		replies = append(replies, op.replies...)
	}
	if text, ok := refusal(replies); ok {
		return fmt.Errorf("%w: %w", errOutOfStep, c.refused(text))
	}
	return errOutOfStep
}

func (c *redisConn) hasEnded() bool {
	select {
	case <-c.ended:
		return true
	default:
		return false
	}
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

// dial connects to the first server of addrs that answers before ctx ends, beginning at index first.
func (d *redisDialer) dial(ctx context.Context, addrs []string, first int) (*redisConn, error) {
	var errs []error
	for i := range addrs {
		place := (first + i) % len(addrs)
		conn, err := d.dialAt(ctx, addrs[place])
		if err == nil {
			conn.place = place
			return conn, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// dialAt connects to the server at addr, or to the primary that the sentinel at addr knows. One that has not
// heard of a failover yet names the old primary. So the server is asked for its role.
func (d *redisDialer) dialAt(ctx context.Context, addr string) (*redisConn, error) {
	if d.target.primary == "" {
		return d.dialServer(ctx, addr)
	}
	server, err := d.askSentinel(ctx, addr)
	if err != nil {
		return nil, fmt.Errorf("sentinel %w", err)
	}
	conn, err := d.dialServer(ctx, server)
	if err != nil {
		return nil, fmt.Errorf("sentinel %s: %w", addr, err)
	}
	return conn, nil
}

// dialServer connects to a server, logs in, selects the database and has it answer an ECHO.
func (d *redisDialer) dialServer(ctx context.Context, addr string) (*redisConn, error) {
	return d.connect(ctx, addr, func(conn *redisConn) error {
		if d.target.user != "" || d.target.password != "" {
			if err := d.logIn(conn); err != nil {
				return err
			}
		}
		if d.target.database != 0 {
			if _, err := conn.do("SELECT", d.target.database); err != nil {
				return err
			}
		}
		if d.target.primary != "" {
			if err := checkPrimary(conn); err != nil {
				return err
			}
		}
		echo, err := redis.String(conn.do("ECHO", conn.nonce))
		if err == nil && echo != conn.nonce {
			return errOutOfStep
		}
		return err
	})
}

// logIn is not left to redigo's dialling, which ignores a user without a password.
func (d *redisDialer) logIn(conn *redisConn) error {
	if d.target.user == "" {
		_, err := conn.do("AUTH", d.target.password)
		return err
	}
	_, err := conn.do("AUTH", d.target.user, d.target.password)
	return err
}

func checkPrimary(conn *redisConn) error {
	role, err := redis.Values(conn.do("ROLE"))
	if err != nil {
		return err
	}
	if len(role) == 0 || fmt.Sprintf("%s", role[0]) != "master" {
		return errNoPrimary
	}
	return nil
}

// askSentinel returns the address of the primary that a sentinel knows. A sentinel is told the password only
// when it asks for one.
func (d *redisDialer) askSentinel(ctx context.Context, sentinel string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, sentinelTimeout)
	defer cancel()
	var addr []string
	ask := func(conn *redisConn) (err error) {
		addr, err = redis.Strings(conn.do("SENTINEL", "get-master-addr-by-name", d.target.primary))
		return err
	}
	conn, err := d.connect(ctx, sentinel, func(conn *redisConn) error {
		err := ask(conn)
		if isRefusal(err, "NOAUTH") && d.target.password != "" {
			if _, err := conn.do("AUTH", d.target.password); err != nil {
				return err
			}
			err = ask(conn)
		}
		if errors.Is(err, redis.ErrNil) {
			return fmt.Errorf("knows no primary %q", d.target.primary)
		}
		if err == nil && len(addr) != 2 {
			return errReplyKind
		}
		return err
	})
	if err != nil {
		return "", err
	}
	conn.fail(errLeft)
	return net.JoinHostPort(addr[0], addr[1]), nil
}

// connect opens a connection and has greet talk to the server, until ctx ends.
func (d *redisDialer) connect(
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
// key's slot. It learns a slot's node from Redis's redirections, and forgets it when the connection to that
// ends. The entry is asked for what is not known.
// https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/
type router struct {
	dialer  *redisDialer
	log     *slog.Logger
	stats   redisStats
	closing context.Context
	close   context.CancelCauseFunc

	mu        sync.Mutex
	entry     *pipeline            // to the first server of REDIS_URL that answers; nil until it is needed
	first     int                  // where dialling it begins in the list of addresses
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
// before it. What timed out goes nowhere: the server is slow enough without.
func (r *router) next(key string, from *pipeline, op *operation, err error) (to *pipeline, asking bool) {
	if errors.Is(err, errLost) {
		if op.sends == 0 {
			return nil, false
		}
		r.stats.retries.Add(1)
		return r.serverOf(key), false
	}
	if errors.Is(err, errNotConnected) && !from.isEntry {
		return r.serverOf(key), false
	}
	if refusal, ok := errors.AsType[*refusedError](err); ok {
		return r.afterRefusal(key, from, refusal)
	}
	return nil, false
}

// afterRefusal is next after a refusal. A redirection means that nothing was done.
func (r *router) afterRefusal(key string, from *pipeline, refusal *refusedError) (to *pipeline, asking bool) {
	word, slot, addr := parseRedirection(refusal)
	switch {
	case word == "MOVED":
		r.stats.redirections.Add(1)
		to := r.moved(slot, addr)
		if to == from { // the address may stand for several machines
			from.leave(0)
		}
		return to, false
	case word == "ASK":
		r.stats.redirections.Add(1)
		return r.asked(addr), true
	case !from.isEntry && isRefusal(refusal, "CLUSTERDOWN"): // it may have left the cluster
		r.unlearn(slotOf(key))
		return r.serverOf(key), false
	case isRefusal(refusal, "READONLY", "MASTERDOWN", "CLUSTERDOWN"): // it is none to ask
		from.leave(minStay)
	}
	return nil, false
}

// ping asks the entry and all nodes, and returns nil when one of them answers.
func (r *router) ping(ctx context.Context) error {
	nodes := r.standingNodes()
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
		r.entry = r.start(&pipeline{
			name:     r.dialer.target.String(),
			isEntry:  true,
			patience: connectTimeout,
			dial:     r.dialEntry,
		})
	}
	return r.entry
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

// dialEntry connects to one of the servers in REDIS_URL, or of the nodes that stand.
func (r *router) dialEntry(ctx context.Context, attempt int) (*redisConn, error) {
	addrs := slices.Clone(r.dialer.target.addrs)
	for _, node := range r.standingNodes() {
		if !slices.Contains(addrs, node.name) {
			addrs = append(addrs, node.name)
		}
	}
	r.mu.Lock()
	first := r.first
	r.mu.Unlock()
	return r.dialer.dial(ctx, addrs, first+attempt)
}

// standingNodes returns the nodes with a connection, in the order of their addresses.
func (r *router) standingNodes() []*pipeline {
	r.mu.Lock()
	defer r.mu.Unlock()
	var standing []*pipeline
	for _, addr := range slices.Sorted(maps.Keys(r.nodes)) {
		if r.nodes[addr].standing() != nil {
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
		r.nodes[addr] = r.start(&pipeline{
			name:     addr,
			patience: operationTimeout,
			dial: func(ctx context.Context, _ int) (*redisConn, error) {
				return r.dialer.dialServer(ctx, addr)
			},
		})
	}
	return r.nodes[addr]
}

func (r *router) unlearn(slot int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.slots[slot] = nil
}

// forget drops a pipeline that is about to end, and what is known of its slots. After a server that hung, or
// that was left, the entry is dialled at the next address.
func (r *router) forget(p *pipeline) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.entry == p {
		r.entry = nil
		if p.conn != nil {
			r.first = p.conn.place
			if errors.Is(p.conn.err, errTimeout) || errors.Is(p.conn.err, errLeft) {
				r.first++
			}
		}
	}
	if r.nodes[p.name] == p {
		delete(r.nodes, p.name)
	}
	for slot, node := range r.slots[:] {
		if node == p {
			r.slots[slot] = nil
		}
	}
}

// followPrimary asks the sentinels again and again. When they name another primary, which answers as one, the
// connection to the old one ends, which may live on behind a partition.
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
		if conn := entry.standing(); conn != nil {
			r.checkStillPrimary(conn)
		}
	}
}

func (r *router) checkStillPrimary(conn *redisConn) {
	ctx, cancel := context.WithTimeout(r.closing, connectTimeout)
	defer cancel()
	primary, err := r.dialer.dial(ctx, r.dialer.target.addrs, conn.place)
	if err != nil {
		return // as long as the connection stands the sentinels are not needed
	}
	primary.fail(errLeft)
	if primary.server != conn.server {
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
