// Sessions: what a session backend promises, session ids and times, and the Redis backend.

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"runtime"
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
	// exist, but then it expires. After errLost the caller may try again, with a new id.
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
	// errLost is an errUnavailable: the answer was lost on the way, and what was asked may have been done.
	errLost = fmt.Errorf("%w: answer lost", errUnavailable)
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

// formatTime returns t in timeFormat, and false if its year has more than four digits.
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

// How long an operation on Redis may take. The worst is 2 s: connectTimeout until there is a connection,
// and then replyTimeout. Past patience an operation is not sent any more.
const (
	connectTimeout  = time.Second            // dialling, all sentinels included
	sentinelTimeout = 500 * time.Millisecond // one sentinel and the primary that it names
	replyTimeout    = time.Second            // from sending to the last reply of a flush
	patience        = time.Second
	connLifetime    = time.Minute // so that a failover behind a stable name is noticed
	renewalPause    = time.Second // between attempts to replace a connection that still works
	maxQueued       = 8192        // operations that wait to be sent
	maxUnread       = 100         // operations of a flush that is written before its replies are read
)

// redisSessions is the Redis backend: one hash a session, as the original program wrote them.
//
// It is a pipeline on one connection. Each operation is queued (enqueue). One goroutine at a time sends all
// that are queued, as a flush (sendQueued). Another reads the replies in order and hands them out
// (receive). No operation waits for another's reply.
type redisSessions struct {
	target *redisTarget
	stats  redisStats

	mu        sync.Mutex
	queue     []*operation
	sending   bool       // a goroutine sends what is queued
	conn      *redisConn // nil before the first one
	successor *redisConn // to replace conn at the next flush
	renewing  bool       // a successor is dialled
	renewedAt time.Time  // the last attempt to dial one
	closed    bool
}

// redisStats counts since the start.
type redisStats struct {
	operations atomic.Int64
	flushes    atomic.Int64
	retries    atomic.Int64
	dials      atomic.Int64
}

// metrics returns what was counted since the start, by name.
func (s *redisSessions) metrics() map[string]int64 {
	return map[string]int64{
		"redis operations": s.stats.operations.Load(),
		"redis flushes":    s.stats.flushes.Load(),
		"redis retries":    s.stats.retries.Load(),
		"redis dials":      s.stats.dials.Load(),
	}
}

// operation is what one request wants of Redis.
type operation struct {
	commands []command // several are one transaction on one key
	deadline time.Time // past it the operation is not sent any more
	once     bool      // it may be sent once only
	retried  bool      // it has had its second try

	// To be read when done is closed.
	answer answer
	conn   *redisConn // that brought the answer
	err    error      // there is no answer; wraps errUnavailable
	done   chan struct{}
}

type command struct {
	name string
	args []any
}

// answer is what Redis said to an operation.
type answer struct {
	reply   any         // to the last command
	refusal redis.Error // the first error among the replies, "" for none
}

func newRedisSessions(target *redisTarget) *redisSessions {
	return &redisSessions{target: target}
}

func sessionKey(id string) string { return "session:" + id }

// Create sends one transaction, so that no session can be left without an end.
func (s *redisSessions) Create(ctx context.Context, id string, user User, ttl time.Duration) error {
	key := sessionKey(id)
	op := newOperation(ctx,
		command{"MULTI", nil},
		command{"HSET", []any{key, "id", user.ID, "name", user.Name, "email", user.Email,
			"createdAt", user.CreatedAt, "updatedAt", user.UpdatedAt}},
		command{"EXPIRE", []any{key, int64(ttl / time.Second)}},
		command{"EXEC", nil})
	op.once = true // a first try that arrives late could bring the session back after its DEL
	err := s.do(op)
	if err == nil {
		err = op.distrust(decodeCreated(op.answer.reply))
	}
	if errors.Is(err, errRefused) {
		// Part of it may have been done: EXEC does not roll back, and after a refused MULTI the rest runs
		// singly. What this leaves behind expires, should the deletion fail.
		go s.Delete(context.WithoutCancel(ctx), id)
	}
	return err
}

func (s *redisSessions) Get(ctx context.Context, id string) (User, error) {
	op := newOperation(ctx, command{"HGETALL", []any{sessionKey(id)}})
	err := s.do(op)
	if strings.HasPrefix(string(op.answer.refusal), "WRONGTYPE") {
		return User{}, errNoSession // the key holds something else than a hash
	}
	if err != nil {
		return User{}, err
	}
	user, err := decodeUser(op.answer.reply)
	return user, op.distrust(err)
}

func (s *redisSessions) Delete(ctx context.Context, id string) error {
	op := newOperation(ctx, command{"DEL", []any{sessionKey(id)}})
	if err := s.do(op); err != nil {
		return err
	}
	deleted, ok := op.answer.reply.(int64)
	if !ok {
		return op.distrust(errReplyShape)
	}
	if deleted == 0 {
		return errNoSession
	}
	return nil
}

// Ping sends an empty flush, which is only its ECHO.
func (s *redisSessions) Ping(ctx context.Context) error {
	return s.do(newOperation(ctx))
}

func (s *redisSessions) Close() error {
	s.mu.Lock()
	s.closed = true
	queue := s.queue
	s.queue = nil
	conns := []*redisConn{s.conn, s.successor}
	s.mu.Unlock()
	for _, op := range queue {
		op.finish(errClosed)
	}
	for _, conn := range conns {
		if conn != nil {
			conn.fail(errClosed, nil)
		}
	}
	return nil
}

var (
	errClosed     = errors.New("the session store is closed")
	errQueueFull  = errors.New("too many requests wait for Redis")
	errTooLate    = errors.New("no connection to Redis in time")
	errReplyShape = fmt.Errorf("%w: a reply of the wrong shape", errUnavailable)
	errOutOfStep  = errors.New("replies out of step")
	errReplySize  = errors.New("a reply larger than any session")
)

// newOperation returns an operation that expires after patience, or earlier if it could otherwise not be
// answered by ctx's deadline. Cancelling ctx does nothing: to watch for that would cost more than a lookup
// takes.
func newOperation(ctx context.Context, commands ...command) *operation {
	op := &operation{commands: commands, deadline: time.Now().Add(patience), done: make(chan struct{})}
	if deadline, ok := ctx.Deadline(); ok && deadline.Add(-replyTimeout).Before(op.deadline) {
		op.deadline = deadline.Add(-replyTimeout)
	}
	return op
}

// do has an operation sent and waits for its answer. It returns errRefused if Redis refused one of the
// commands.
func (s *redisSessions) do(op *operation) error {
	s.stats.operations.Add(1)
	if err := s.enqueue(op); err != nil {
		return unavailable(err)
	}
	<-op.done
	if op.err != nil {
		return op.err
	}
	if op.answer.refusal != "" {
		return unavailable(op.answer.refusal)
	}
	return nil
}

// distrust ends the connection that brought the answer if err says that it has the wrong shape. It returns
// err.
func (op *operation) distrust(err error) error {
	if errors.Is(err, errReplyShape) {
		op.conn.fail(err, nil)
	}
	return err
}

// unavailable marks err as errRefused if Redis said it, and as errUnavailable otherwise. Redis quotes
// arguments behind ", with args", such as session ids and passwords, which no log may hold.
func unavailable(err error) error {
	if errors.Is(err, errUnavailable) {
		return err
	}
	if _, refused := errors.AsType[redis.Error](err); refused {
		text, _, _ := strings.Cut(err.Error(), ", with args")
		return fmt.Errorf("%w: %w", errRefused, redis.Error(text))
	}
	return fmt.Errorf("%w: %w", errUnavailable, err)
}

// enqueue sees to it that op is sent and, in the end, finished.
func (s *redisSessions) enqueue(op *operation) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errClosed
	}
	if !time.Now().Before(op.deadline) {
		return errTooLate
	}
	if len(s.queue) >= maxQueued {
		return errQueueFull
	}
	s.queue = append(s.queue, op)
	if !s.sending {
		s.sending = true
		go s.sendQueued()
	}
	return nil
}

// sendQueued sends what is queued, until nothing is.
func (s *redisSessions) sendQueued() {
	for {
		runtime.Gosched() // requests that are ready to run join this flush
		s.mu.Lock()
		operations := s.queue
		s.queue = make([]*operation, 0, len(operations))
		if len(operations) == 0 {
			s.sending = false
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
		operations = inTime(operations)
		if len(operations) == 0 {
			continue
		}
		conn, err := s.connection()
		if err != nil {
			for _, op := range operations {
				op.finish(err)
			}
			continue
		}
		conn.send(inTime(operations))
	}
}

// inTime ends the operations that have expired, and returns the others in the same slice.
func inTime(operations []*operation) []*operation {
	now := time.Now()
	rest := operations[:0]
	for _, op := range operations {
		if now.Before(op.deadline) {
			rest = append(rest, op)
		} else {
			op.finish(errTooLate)
		}
	}
	return rest
}

// connection returns the connection to send on. It dials the first one, and one in place of one that failed.
func (s *redisSessions) connection() (*redisConn, error) {
	if conn := s.current(); conn != nil {
		return conn, nil
	}
	conn, err := s.dial()
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conn = conn
	if s.closed {
		conn.fail(errClosed, nil)
	}
	return conn, nil
}

// current returns the connection if it works, or its successor. An old connection is used until its
// successor stands.
func (s *redisSessions) current() *redisConn {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.successor != nil && !s.successor.failed() {
		s.conn.retire()
		s.conn = s.successor
	}
	s.successor = nil
	if s.conn == nil || s.conn.failed() {
		return nil
	}
	if time.Since(s.conn.dialedAt) > connLifetime {
		s.startRenewal()
	}
	return s.conn
}

// startRenewal dials a successor to the connection, unless that is being done or was tried just now. The
// caller holds s.mu.
func (s *redisSessions) startRenewal() {
	if !s.renewing && time.Since(s.renewedAt) > renewalPause {
		s.renewing = true
		go s.renew()
	}
}

func (s *redisSessions) renew() {
	conn, err := s.dial()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.renewing = false
	s.renewedAt = time.Now()
	if err != nil {
		return
	}
	s.successor = conn
	if s.closed {
		conn.fail(errClosed, nil)
	}
}

// dial returns a connection that stands: Redis has answered on it.
func (s *redisSessions) dial() (*redisConn, error) {
	s.stats.dials.Add(1)
	ctx, cancel := context.WithTimeout(context.Background(), connectTimeout)
	defer cancel()
	link, err := s.target.dial(ctx)
	if err != nil {
		return nil, err
	}
	nonce := rand.Text()
	echo, err := redis.String(link.Do("ECHO", nonce))
	if err == nil && echo != nonce {
		err = errOutOfStep
	}
	if err != nil {
		link.Close()
		return nil, err
	}
	link.socket.Conn.SetDeadline(time.Time{})
	link.socket.maxDepth = 1
	conn := &redisConn{sessions: s, link: link, dialedAt: time.Now(), noncePrefix: nonce}
	conn.changed.L = &conn.mu
	go conn.receive()
	return conn, nil
}

// settle ends an operation whose connection failed, or has it sent once more on a fresh one. What timed out
// is not tried again. spendsRetry is false where the operation only shared its connection with a reply too
// large.
func (s *redisSessions) settle(op *operation, err error, spendsRetry bool) {
	timedOut := errors.Is(err, os.ErrDeadlineExceeded)
	if op.once && !timedOut {
		err = fmt.Errorf("%w: %w", errLost, err)
	}
	if !op.once && !op.retried && !timedOut && time.Now().Before(op.deadline) {
		op.retried = spendsRetry
		s.stats.retries.Add(1)
		if s.enqueue(op) == nil {
			return
		}
	}
	op.finish(err)
}

func (op *operation) finish(err error) {
	op.err = unavailable(err)
	close(op.done)
}

// redisConn is a connection and what was sent on it and is not answered yet.
type redisConn struct {
	sessions    *redisSessions
	link        *redisLink
	dialedAt    time.Time
	noncePrefix string // never used before
	flushed     int    // flushes so far; only the sender counts

	mu       sync.Mutex
	changed  sync.Cond
	inFlight []*flush // the oldest first
	err      error    // why it ended; nothing is in flight then
	retired  bool     // nothing more is sent
}

// flush is a batch of operations that are sent together. It ends in an ECHO of a nonce: unless that comes
// back in its place none of the replies is believed. A connection that is a single reply out of step would
// hand each client the session of the one before it. The order of replies within a flush is trusted.
type flush struct {
	operations []*operation
	answers    []answer // to operations, in their order
	nonce      string
	deadline   time.Time
}

// send sends operations as a flush. Only one goroutine at a time may call it.
func (c *redisConn) send(operations []*operation) {
	c.flushed++
	f := &flush{
		operations: operations,
		nonce:      c.noncePrefix + strconv.Itoa(c.flushed),
		deadline:   time.Now().Add(replyTimeout),
	}
	c.mu.Lock()
	err := c.err
	if err == nil {
		c.inFlight = append(c.inFlight, f)
	}
	c.mu.Unlock()
	if err != nil {
		for _, op := range f.operations { // which were not sent
			if c.sessions.enqueue(op) != nil {
				op.finish(err)
			}
		}
		return
	}
	c.sessions.stats.flushes.Add(1)
	if len(f.operations) > maxUnread {
		c.changed.Signal()
	}
	// If the connection is closed, whoever closed it fails it and knows why.
	if err := c.write(f); err != nil && !errors.Is(err, net.ErrClosed) {
		c.fail(err, nil)
	}
	c.changed.Signal()
}

func (c *redisConn) write(f *flush) error {
	c.link.socket.Conn.SetWriteDeadline(f.deadline)
	for _, op := range f.operations {
		for _, cmd := range op.commands {
			if err := c.link.Send(cmd.name, cmd.args...); err != nil {
				return err
			}
		}
	}
	if err := c.link.Send("ECHO", f.nonce); err != nil {
		return err
	}
	return c.link.Flush()
}

// receive reads the replies to what was sent, flush after flush, until the connection ends.
func (c *redisConn) receive() {
	for {
		f := c.oldest()
		if f == nil {
			c.link.Close()
			return
		}
		if culprit, err := c.receiveFlush(f); err != nil {
			if errors.Is(err, net.ErrClosed) && c.link.Err() != nil {
				err = c.link.Err() // for which redigo closed the connection
			}
			c.fail(err, culprit)
			return
		}
		if !c.answered() {
			return // fail has told each operation
		}
		for i, op := range f.operations {
			op.answer = f.answers[i]
			op.conn = c
			close(op.done)
		}
	}
}

// oldest waits for a flush to be in flight and returns the oldest. It returns nil when the connection has
// ended.
func (c *redisConn) oldest() *flush {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.inFlight) == 0 {
		if c.err != nil || c.retired {
			return nil
		}
		c.changed.Wait()
	}
	return c.inFlight[0]
}

// answered takes the oldest flush off what is in flight. It is false when the connection has failed.
func (c *redisConn) answered() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return false
	}
	c.inFlight = c.inFlight[1:]
	return true
}

// receiveFlush reads the answers to f and proves them. After an error they are worth nothing; culprit is the
// operation whose reply was too large.
func (c *redisConn) receiveFlush(f *flush) (culprit *operation, err error) {
	c.link.socket.Conn.SetReadDeadline(f.deadline)
	c.link.socket.skipped = 0
	f.answers = make([]answer, len(f.operations))
	for i, op := range f.operations {
		err := c.receiveAnswer(op, &f.answers[i])
		if errors.Is(err, errReplySize) {
			return op, err
		}
		if err != nil {
			return nil, err
		}
	}
	proof, err := c.link.Receive()
	if err != nil {
		return nil, err
	}
	if nonce, ok := proof.([]byte); !ok || string(nonce) != f.nonce {
		return nil, errOutOfStep
	}
	return nil, nil
}

func (c *redisConn) receiveAnswer(op *operation, a *answer) error {
	for range op.commands {
		reply, err := c.link.Receive()
		refusal, refused := err.(redis.Error)
		if err != nil && !refused {
			return err
		}
		if refused && a.refusal == "" {
			a.refusal = refusal
		}
		if strings.HasPrefix(string(refusal), "READONLY") { // it is no primary any more
			c.sessions.mu.Lock()
			c.sessions.startRenewal()
			c.sessions.mu.Unlock()
		}
		a.reply = reply
	}
	return nil
}

// fail ends the connection. Every connection with something in flight ends here, and the first error wins.
// All operations in flight are settled, except a culprit, which is not tried again.
func (c *redisConn) fail(err error, culprit *operation) {
	c.mu.Lock()
	if c.err == nil {
		c.err = err
	}
	inFlight := c.inFlight
	c.inFlight = nil
	c.mu.Unlock()
	c.changed.Signal()
	c.link.Close()
	for _, f := range inFlight {
		for _, op := range f.operations {
			if op == culprit {
				op.finish(err)
			} else {
				c.sessions.settle(op, err, culprit == nil)
			}
		}
	}
}

func (c *redisConn) failed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err != nil
}

// retire ends the connection when all that is in flight is answered.
func (c *redisConn) retire() {
	c.mu.Lock()
	c.retired = true
	c.mu.Unlock()
	c.changed.Signal()
}

// decodeCreated reads EXEC's reply: what HSET and EXPIRE answered. redigo takes errors within it for values.
func decodeCreated(reply any) error {
	results, ok := reply.([]any)
	if !ok || len(results) != 2 {
		return errReplyShape
	}
	for _, result := range results {
		switch result := result.(type) {
		case redis.Error:
			return unavailable(result)
		case int64:
		default:
			return errReplyShape
		}
	}
	if results[1] != any(int64(1)) {
		return fmt.Errorf("%w: EXPIRE answered %d", errRefused, results[1])
	}
	return nil
}

// decodeUser reads HGETALL's reply. A hash without an id is errNoSession, what is no hash errReplyShape,
// and one too large for a session errUnavailable.
func decodeUser(reply any) (User, error) {
	fields, ok := reply.([]any)
	if !ok || len(fields)%2 != 0 {
		return User{}, errReplyShape
	}
	var user User
	var createdAt, updatedAt, updateAt string
	for i := 0; i < len(fields); i += 2 {
		name, isName := fields[i].([]byte)
		value, isValue := fields[i+1].([]byte)
		if fields[i] == any(tooLarge) || fields[i+1] == any(tooLarge) {
			return User{}, unavailable(errReplySize)
		}
		if !isName || !isValue {
			return User{}, errReplyShape
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

// redisTarget is where sessions are: one Redis, or the primary that sentinels know by name.
type redisTarget struct {
	scheme   string   // redis, rediss or redis-sentinel
	addrs    []string // host:port of the Redis, or of each sentinel
	primary  string   // its name, "" without sentinels
	user     string   // with an empty password too: no login
	password string
	database int

	sentinel atomic.Int32 // the index of the one to ask first
}

const redisURLForms = "redis://[[user]:password@]host[:port][/database], rediss://… the same over TLS, " +
	"or redis-sentinel://[[user]:password@]host[:port][,host[:port]…]/primary[/database], " +
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
	if len(t.addrs) > 1 && !sentinels {
		return nil, errors.New("only redis-sentinel:// takes several hosts")
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

// redisLink is a connection of redigo and the socket under it.
type redisLink struct {
	redis.Conn
	socket *guardedSocket
}

// dial connects to Redis until ctx ends. Sentinels are asked in turn at every dial, so that a failover asks
// for nothing else.
func (t *redisTarget) dial(ctx context.Context) (*redisLink, error) {
	if t.primary == "" {
		return t.dialServer(ctx, t.addrs[0])
	}
	var errs []error
	first := int(t.sentinel.Load())
	for i := range t.addrs {
		next := (first + i) % len(t.addrs)
		t.sentinel.Store(int32(next))
		if ctx.Err() != nil {
			errs = append(errs, ctx.Err())
			break // the next dial begins here
		}
		link, err := t.dialPrimary(ctx, t.addrs[next])
		if err == nil {
			return link, nil
		}
		errs = append(errs, fmt.Errorf("sentinel %s: %w", t.addrs[next], err))
	}
	return nil, errors.Join(errs...)
}

// dialPrimary connects to the primary that one sentinel names. A sentinel that has not yet heard of a
// failover names the old one, which then says in its ROLE that it is a replica.
func (t *redisTarget) dialPrimary(ctx context.Context, sentinel string) (*redisLink, error) {
	ctx, cancel := context.WithTimeout(ctx, sentinelTimeout)
	defer cancel()
	addr, err := t.askSentinel(ctx, sentinel)
	if err != nil {
		return nil, err
	}
	link, err := t.dialServer(ctx, addr)
	if err != nil {
		return nil, err
	}
	role, err := redis.Values(link.Do("ROLE"))
	if err != nil {
		link.Close()
		return nil, fmt.Errorf("asking %s for its role: %w", addr, err)
	}
	if len(role) == 0 || fmt.Sprintf("%s", role[0]) != "master" {
		link.Close()
		return nil, fmt.Errorf("%s is no primary", addr)
	}
	return link, nil
}

// askSentinel returns the address of the primary. A sentinel that asks for a password gets the primary's.
func (t *redisTarget) askSentinel(ctx context.Context, sentinel string) (string, error) {
	link, err := t.connect(ctx, sentinel)
	if err != nil {
		return "", err
	}
	defer link.Close()
	const name = "get-master-addr-by-name"
	reply, err := link.Do("SENTINEL", name, t.primary)
	refusal, _ := err.(redis.Error)
	if strings.HasPrefix(string(refusal), "NOAUTH") && t.password != "" {
		if _, err := link.Do("AUTH", t.password); err != nil {
			return "", err
		}
		reply, err = link.Do("SENTINEL", name, t.primary)
	}
	addr, err := redis.Strings(reply, err)
	if errors.Is(err, redis.ErrNil) {
		return "", fmt.Errorf("knows no primary %q", t.primary)
	}
	if err != nil {
		return "", err
	}
	if len(addr) != 2 {
		return "", errReplyShape
	}
	return net.JoinHostPort(addr[0], addr[1]), nil
}

// dialServer connects to a Redis, logs in and selects the database.
func (t *redisTarget) dialServer(ctx context.Context, addr string) (*redisLink, error) {
	link, err := t.connect(ctx, addr)
	if err != nil {
		return nil, err
	}
	if err := t.logIn(link); err != nil {
		link.Close()
		return nil, fmt.Errorf("logging in at %s: %w", addr, err)
	}
	return link, nil
}

func (t *redisTarget) logIn(link *redisLink) error {
	if t.user != "" || t.password != "" {
		login := []any{t.user, t.password}
		if t.user == "" {
			login = login[1:]
		}
		if _, err := link.Do("AUTH", login...); err != nil {
			return err
		}
	}
	if t.database != 0 {
		if _, err := link.Do("SELECT", t.database); err != nil {
			return err
		}
	}
	return nil
}

// connect opens a connection whose reads and writes fail when ctx's deadline has passed.
func (t *redisTarget) connect(ctx context.Context, addr string) (*redisLink, error) {
	dial := new(net.Dialer).DialContext
	if t.scheme == "rediss" {
		dial = new(tls.Dialer).DialContext
	}
	conn, err := dial(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	deadline, _ := ctx.Deadline()
	conn.SetDeadline(deadline)
	socket := &guardedSocket{Conn: conn, maxDepth: maxRoleDepth}
	return &redisLink{redis.NewConn(socket, 0, 0), socket}, nil
}

// The largest reply that a session can need. The original takes bodies of 100 kB.
const (
	maxBulkString    = 256 << 10 // bytes
	maxSkipped       = 4 << 20   // bytes of larger ones thrown away in a flush; past it the connection ends
	maxArrayElements = 64        // of a hash: half of them fields
	maxRoleDepth     = 3         // of arrays in ROLE's reply
	maxLineLength    = 4 << 10   // bytes
)

// tooLarge stands in the place of a bulk string that is larger than maxBulkString.
const tooLarge = redis.Error("TOOLARGE")

// guardedSocket checks what Redis announces before redigo believes it: redigo allocates whatever a "$" or "*"
// line says and descends into arrays without bound, so that one line of garbage could end the process.
type guardedSocket struct {
	net.Conn
	maxDepth int          // of arrays
	buffer   []byte       // what is read at a time
	checked  bytes.Buffer // what redigo may read
	line     []byte       // the beginning of a line whose end is still to come
	bulk     int          // bytes still to come of a bulk string, its line break included
	skip     bool         // that bulk string is too large
	skipped  int          // bytes of such strings in this flush
	open     []int        // elements still to come of each array that has begun, the outermost first
	err      error        // what comes after checked
}

// SetReadDeadline does nothing: redigo calls it for every reply, and a flush has its deadline already.
func (g *guardedSocket) SetReadDeadline(time.Time) error { return nil }

// Close does not wait until TLS has said goodbye.
func (g *guardedSocket) Close() error {
	if conn, ok := g.Conn.(*tls.Conn); ok {
		return conn.NetConn().Close()
	}
	return g.Conn.Close()
}

// Read first returns the bytes before a refused line. So the error meets the operation whose reply was
// refused.
func (g *guardedSocket) Read(p []byte) (int, error) {
	if g.buffer == nil {
		g.buffer = make([]byte, 16<<10)
	}
	for g.checked.Len() == 0 {
		if g.err != nil {
			return 0, g.err
		}
		n, err := g.Conn.Read(g.buffer)
		g.err = g.check(g.buffer[:n])
		if g.err == nil {
			g.err = err
		}
	}
	return g.checked.Read(p)
}

// check adds to g.checked what redigo may read of b.
func (g *guardedSocket) check(b []byte) error {
	for len(b) > 0 {
		if g.bulk > 0 {
			n := min(g.bulk, len(b))
			if !g.skip {
				g.checked.Write(b[:n])
			}
			g.bulk -= n
			b = b[n:]
			continue
		}
		end := bytes.IndexByte(b, '\n') + 1
		n := end
		if end == 0 {
			n = len(b)
		}
		g.line = append(g.line, b[:n]...)
		b = b[n:]
		if len(g.line) > maxLineLength {
			return errReplySize
		}
		if end == 0 {
			return nil
		}
		if err := g.checkLine(); err != nil {
			return err
		}
		g.line = g.line[:0]
	}
	return nil
}

// checkLine follows a line of RESP 2, https://redis.io/docs/latest/develop/reference/protocol-spec/. redigo
// refuses all else that is malformed.
func (g *guardedSocket) checkLine() error {
	for len(g.open) > 0 && g.open[len(g.open)-1] == 0 {
		g.open = g.open[:len(g.open)-1]
	}
	if len(g.open) > 0 {
		g.open[len(g.open)-1]--
	}
	if g.line[0] != '$' && g.line[0] != '*' {
		g.checked.Write(g.line)
		return nil
	}
	n, err := strconv.Atoi(string(bytes.TrimSpace(g.line[1:])))
	if err != nil {
		return errReplySize // too many digits, if digits at all
	}
	g.skip = false
	switch {
	case n < 0: // null: nothing follows
	case g.line[0] == '$' && n <= maxBulkString:
		g.bulk = n + len("\r\n")
	case g.line[0] == '$' && n <= maxSkipped-g.skipped:
		g.bulk = n + len("\r\n")
		g.skip = true
		g.skipped += n
	case g.line[0] == '*' && n <= maxArrayElements && len(g.open) < g.maxDepth:
		g.open = append(g.open, n)
	default:
		return errReplySize
	}
	if g.skip {
		g.checked.WriteString("-" + string(tooLarge) + "\r\n")
	} else {
		g.checked.Write(g.line)
	}
	return nil
}
