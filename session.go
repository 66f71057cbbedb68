// Sessions: what a session backend promises, session ids and the cookie, and the Redis backend.

package main

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"expvar"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gomodule/redigo/redis"
)

// SessionStore keeps sessions. It has no update: what is never rewritten cannot come back to life when a
// slow request writes after a sign-out.
//
// Every method may be called from any goroutine, gives up within 3 s, and keeps "there is no such
// session" (errNoSession), which signs a user out, apart from "I could not find out" (an error wrapping
// errUnavailable), which must not.
type SessionStore interface {
	// Create makes session id for user, to live for ttl (whole seconds), and in the same step deletes
	// the session that it replaces unless replaced is empty. After an error no session id exists that
	// does not end by itself.
	Create(ctx context.Context, id, replaced string, user User, ttl time.Duration) error
	// Get returns the user as of the session's creation. A session that is missing, expired or
	// unreadable is errNoSession.
	Get(ctx context.Context, id string) (User, error)
	// Delete ends session id. One that does not exist is no error.
	Delete(ctx context.Context, id string) error
	// Ping returns nil when the store answers.
	Ping(ctx context.Context) error
	// Close releases what the store holds.
	Close() error
}

var errUnavailable = errors.New("store unavailable")

// unavailable marks err as a store's failure to answer.
func unavailable(err error) error { return fmt.Errorf("%w: %w", errUnavailable, err) }

// timeFormat is how times are stored and sent: UTC, milliseconds, as JavaScript's Date.toISOString.
const timeFormat = "2006-01-02T15:04:05.000Z"

// normalizeTime brings a time of a session hash into timeFormat. It reads RFC 3339 and JavaScript's
// Date.toString, such as "Sun Mar 30 2025 20:00:00 GMT+0000 (Coordinated Universal Time)".
func normalizeTime(text string) (string, error) {
	t, err := time.Parse(time.RFC3339, text)
	if err != nil {
		text, _, _ = strings.Cut(text, " (")
		t, err = time.Parse("Mon Jan 02 2006 15:04:05 GMT-0700", text)
	}
	return t.UTC().Format(timeFormat), err
}

// newUUID returns a random (version 4) UUID, RFC 9562: 122 bits from the system's generator.
func newUUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails: it would end the process
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func isUUID(s string) bool {
	return len(s) == 36 && s[8] == '-' && s[13] == '-' && s[18] == '-' && s[23] == '-' &&
		strings.Count(s, "-") == 4 && strings.Trim(s, "0123456789-abcdefABCDEF") == ""
}

const cookieName = "session-id"

// sessionID returns the session id in the request's cookie, or "" when there is none that could be one.
func sessionID(r *http.Request) string {
	if cookie, err := r.Cookie(cookieName); err == nil && isUUID(cookie.Value) {
		return cookie.Value
	}
	return ""
}

// setSessionCookie sends the session cookie; an empty id clears it.
func (s *server) setSessionCookie(w http.ResponseWriter, id string) {
	maxAge := int(s.cfg.sessionTTL / time.Second)
	if id == "" {
		maxAge = -1 // written as Max-Age=0
	}
	http.SetCookie(w, &http.Cookie{Name: cookieName, Value: id, Path: "/", MaxAge: maxAge,
		HttpOnly: true, Secure: s.cfg.cookieSecure, SameSite: http.SameSiteLaxMode})
}

// redisTarget is where sessions are: one Redis, or the primary of a name that sentinels know.
type redisTarget struct {
	url, scheme string
	addrs       []string           // host:port of the Redis, or of each sentinel
	primary     string             // its name, "" without sentinels
	login       []redis.DialOption // user, password and database
}

const redisURLForms = "redis://[user:password@]host:port[/db], rediss://… for TLS, or " +
	"redis-sentinel://[user:password@]host:port[,host:port…]/primary[/db], special characters percent-encoded"

// parseRedisURL reads a URL of one of redisURLForms.
func parseRedisURL(value string) (t *redisTarget, ok bool) {
	hosts := `([^@/?#,]+)()`
	if strings.HasPrefix(value, "redis-sentinel:") {
		hosts = `([^@/?#]+)/([^/?#]+)`
	}
	form := `^(rediss?|redis-sentinel)://((?:[^:@/?#]*:[^@/?#]+@)?)` + hosts + `(?:/(\d{0,9}))?$`
	m := regexp.MustCompile(form).FindStringSubmatch(value)
	if m == nil {
		return nil, false
	}
	t = &redisTarget{url: value, scheme: m[1], addrs: strings.Split(m[3], ","), primary: m[4]}
	account, err := url.Parse("redis://" + m[2])
	if err != nil {
		return nil, false
	}
	password, _ := account.User.Password()
	db, _ := strconv.Atoi(m[5])
	t.login = []redis.DialOption{redis.DialUsername(account.User.Username()), redis.DialPassword(password), redis.DialDatabase(db)}
	return t, !slices.ContainsFunc(t.addrs, func(addr string) bool { return strings.HasPrefix(addr, ":") || !validAddr(addr) })
}

// redactURL takes whatever could be a password out of a URL that may be malformed.
func redactURL(value string) string {
	return regexp.MustCompile(`(?s)^([a-z-]+://)?.*@|[?#].*`).ReplaceAllString(value, "$1…")
}

// dial connects to Redis, bounded by ctx. Sentinels are asked in turn at every dial, so that a failover
// asks for nothing else.
func (t *redisTarget) dial(ctx context.Context) (c redis.Conn, err error) {
	if t.primary == "" {
		return t.connect(ctx, t.addrs[0], t.login...)
	}
	var errs []error
	for _, sentinel := range t.addrs {
		if c, err = t.dialPrimary(ctx, sentinel); err == nil {
			return c, nil
		}
		errs = append(errs, fmt.Errorf("sentinel %s: %w", sentinel, err))
	}
	return nil, errors.Join(errs...)
}

// dialPrimary connects to the primary that one sentinel names. A sentinel that has not yet heard of a
// failover names the old one, which its ROLE betrays.
func (t *redisTarget) dialPrimary(ctx context.Context, sentinel string) (redis.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, sentinelTimeout)
	defer cancel()
	c, err := t.connect(ctx, sentinel)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	addr, err := redis.Strings(redis.DoContext(c, ctx, "SENTINEL", "get-master-addr-by-name", t.primary))
	if err != nil || len(addr) != 2 {
		return nil, fmt.Errorf("primary %q is at %q: %v", t.primary, addr, err)
	}
	primary, err := t.connect(ctx, net.JoinHostPort(addr[0], addr[1]), t.login...)
	if err != nil {
		return nil, err
	}
	role, err := redis.Values(redis.DoContext(primary, ctx, "ROLE"))
	if err != nil || len(role) == 0 || fmt.Sprintf("%s", role[0]) != "master" {
		primary.Close()
		return nil, fmt.Errorf("%q is no primary: %v", addr, err)
	}
	return primary, nil
}

func (t *redisTarget) connect(ctx context.Context, addr string, login ...redis.DialOption) (redis.Conn, error) {
	dial := new(net.Dialer).DialContext
	if t.scheme == "rediss" {
		dial = new(tls.Dialer).DialContext
	}
	return redis.DialContext(ctx, "tcp", addr, append(login, redis.DialContextFunc(
		func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := dial(ctx, network, addr)
			return &guardedConn{Conn: c}, err
		}))...)
}

// guardedConn refuses replies that no session can need before redigo believes the length they announce:
// it allocates whatever a "$" or "*" says and descends into arrays without bound, so that one line of
// garbage could end the process. It bounds writing in time, too.
type guardedConn struct {
	net.Conn
	budget int  // bytes of memory that the exchange's replies may still claim
	kind   byte // first byte of the line being read, 0 before it
	length int  // the number in that line so far
	skip   int  // bytes of a bulk string still to come
}

func (g *guardedConn) Write(p []byte) (int, error) {
	if g.budget < maxReplies { // the first write of an exchange
		g.budget = maxReplies
		g.SetWriteDeadline(time.Now().Add(exchangeTimeout))
	}
	return g.Conn.Write(p)
}

func (g *guardedConn) Read(p []byte) (int, error) {
	n, err := g.Conn.Read(p)
	for _, b := range p[:n] {
		switch {
		case g.skip > 0:
			g.skip--
		case g.kind == 0:
			g.kind, g.length, g.budget = b, 0, g.budget-element
		case b == '\n' && g.kind == '$':
			g.kind, g.skip, g.budget = 0, g.length+len("\r\n"), g.budget-g.length
		case b == '\n' && g.kind == '*':
			g.kind, g.budget = 0, g.budget-g.length*element
		case b == '\n':
			g.kind = 0
		case b == '-': // "$-1" and "*-1": null, nothing follows
			g.kind = b
		case b >= '0' && b <= '9':
			g.length = min(g.length*10+int(b-'0'), maxReplies+1)
		}
		if g.budget--; g.budget < 0 {
			return 0, errors.New("reply out of bounds")
		}
	}
	return n, err
}

// How long and how much an exchange with Redis may take. An operation waits for the exchange before its own, too.
const (
	exchangeTimeout = time.Second            // connecting, writing, reading and one retry
	sentinelTimeout = 250 * time.Millisecond // for one sentinel and the primary that it names
	connLifetime    = time.Minute            // so that a failover behind a stable name is noticed
	maxBatch        = 8192                   // operations; as many more may wait
	maxReplies      = 32 << 20               // bytes of memory
	element         = 64                     // bytes that redigo spends on a reply of any kind, at least
)

// redisSessions is the Redis backend: one hash a session, as the original program wrote them.
//
// Operations are batched: those that arrive while a batch is on the wire leave together as the next one,
// a group commit. Alone, an operation goes at once; under load hundreds share two system calls.
type redisSessions struct {
	target  *redisTarget
	metrics *expvar.Map
	waiting chan *operation
	turn    chan struct{} // full while a batch is on the wire
	conn    redis.Conn    // nil before the first dial
	dialed  time.Time
}

// operation is what one request wants of Redis: commands, of which the last one's reply tells.
type operation struct {
	cmds     [][]any
	answered chan struct{}
	reply    any
	err      error // wraps errUnavailable, from the start: even a panic does not pass for an answer
}

func newRedisSessions(target *redisTarget, metrics *expvar.Map) *redisSessions {
	return &redisSessions{target: target, metrics: metrics, waiting: make(chan *operation, maxBatch), turn: make(chan struct{}, 1)}
}

func sessionKey(id string) string { return "session:" + id }

func (s *redisSessions) Create(ctx context.Context, id, replaced string, u User, ttl time.Duration) error {
	cmds := [][]any{
		{"HSET", sessionKey(id), "id", u.ID, "name", u.Name, "email", u.Email, "createdAt", u.CreatedAt, "updatedAt", u.UpdatedAt},
		{"EXPIRE", sessionKey(id), int64(ttl / time.Second)}}
	if replaced != "" {
		cmds = slices.Insert(cmds, 0, []any{"DEL", sessionKey(replaced)})
	}
	expires, err := s.do(cmds...)
	if err == nil && expires != any(int64(1)) {
		err = unavailable(fmt.Errorf("EXPIRE answered %v", expires))
	}
	if err != nil { // EXEC runs the rest when one command fails; without EXPIRE the session would not end
		go s.Delete(ctx, id)
	}
	return err
}

func (s *redisSessions) Get(_ context.Context, id string) (User, error) {
	return userOfHash(s.do([]any{"HGETALL", sessionKey(id)}))
}

func (s *redisSessions) Delete(_ context.Context, id string) error {
	_, err := s.do([]any{"DEL", sessionKey(id)})
	return err
}

func (s *redisSessions) Ping(context.Context) error {
	_, err := s.do()
	return err
}

func (s *redisSessions) Close() error {
	if s.turn <- struct{}{}; s.conn != nil {
		return s.conn.Close()
	}
	return nil
}

// do returns the last command's reply. It does not end with the request's context: it is answered in time,
// and waiting for either would cost more than the whole lookup.
func (s *redisSessions) do(cmds ...[]any) (any, error) {
	op := &operation{cmds: cmds, answered: make(chan struct{}), err: errUnavailable}
	select {
	case s.waiting <- op:
	default: // or the last to wait would do so for many batches that fail, 1 s each
		return nil, unavailable(errors.New("too many requests wait for the session store"))
	}
	for {
		select {
		case <-op.answered:
			return op.reply, op.err
		case s.turn <- struct{}{}: // nobody is at it: this goroutine serves all that wait
			s.serveBatch()
		}
	}
}

// serveBatch answers those that wait. What fails on a connection that turned out dead or out of step, or on a
// server that no longer is the primary, is tried once more on a fresh one: all that this store does can be
// done twice.
func (s *redisSessions) serveBatch() {
	runtime.Gosched() // requests that are ready to run come first, and into this batch
	var batch []*operation
	for range len(s.waiting) {
		batch = append(batch, <-s.waiting)
	}
	defer func() {
		for _, op := range batch {
			close(op.answered)
		}
		<-s.turn
	}()
	if len(batch) == 0 { // this goroutine's own operation was answered just now
		return
	}
	deadline := time.Now().Add(exchangeTimeout)
	err := s.exchange(deadline, batch...)
	if err != nil && time.Now().Before(deadline) {
		err = s.exchange(deadline, batch...)
	}
	_, refused := errors.AsType[redis.Error](err)
	for _, op := range batch {
		if refused && len(batch) > 1 { // a full Redis refuses every transaction, and still answers reads
			err = s.exchange(deadline, op)
		}
		if err != nil {
			op.err = unavailable(err)
		}
	}
}

// exchange sends operations in one round trip. Several commands are a transaction, so that their replies
// come back as one, EXEC's, within which nothing can be lost, repeated or swapped on the way. After an error
// the connection is closed.
func (s *redisSessions) exchange(deadline time.Time, batch ...*operation) (err error) {
	if s.conn == nil || s.conn.Err() != nil || time.Since(s.dialed) > connLifetime {
		if s.conn != nil {
			s.conn.Close()
		}
		ctx, cancel := context.WithDeadline(context.Background(), deadline)
		defer cancel()
		if s.conn, err = s.target.dial(ctx); err != nil {
			return err
		}
		s.dialed = time.Now()
	}
	var cmds [][]any
	for _, op := range batch {
		cmds = append(cmds, op.cmds...)
	}
	nonce := rand.Text()
	sent := append(cmds, []any{"PING", nonce})
	if len(cmds) > 1 {
		sent = slices.Concat([][]any{{"MULTI"}}, sent, [][]any{{"EXEC"}})
	}
	for _, cmd := range sent {
		s.conn.Send(cmd[0].(string), cmd[1:]...) // what fails shows below
	}
	replies, err := redis.Values(redis.DoWithTimeout(s.conn, max(1, time.Until(deadline)), ""))
	if err == nil {
		replies, err = proven(replies, cmds, nonce)
	}
	if err != nil {
		s.conn.Close()
		return err
	}
	for _, op := range batch {
		n := len(op.cmds)
		op.reply, op.err, replies = replies[max(0, n-1)], nil, replies[n:]
	}
	s.metrics.Add("sessionBatches", 1)
	return nil
}

// proven returns the reply to each of cmds and the PING behind them. An exchange proves itself: unless that
// PING's value, never used before, comes back in its place, nothing is believed. A connection that is a single
// reply out of step would hand each client the session of the one before it. Nor is a reply believed that its
// command cannot have.
func proven(all []any, cmds [][]any, nonce string) ([]any, error) {
	replies := all
	if len(cmds) > 1 {
		replies, _ = all[len(all)-1].([]any)
	}
	for i, reply := range replies {
		if refused, ok := reply.(redis.Error); ok && strings.HasPrefix(string(refused), "WRONGTYPE") {
			replies[i] = []any{} // as if there were no hash
		}
	}
	for _, reply := range slices.Concat(all, replies) {
		if refused, ok := reply.(redis.Error); ok {
			return nil, refused
		}
	}
	if len(replies) != len(cmds)+1 || fmt.Sprintf("%s", replies[len(cmds)]) != nonce {
		return nil, errors.New("replies out of step")
	}
	for i, cmd := range cmds {
		_, isInt := replies[i].(int64)
		if _, isHash := replies[i].([]any); isHash == isInt || isHash != (cmd[0] == "HGETALL") {
			return nil, fmt.Errorf("%s answered %T", cmd[0], replies[i]) // not %v: it could be another's hash
		}
	}
	return replies, nil
}

// userOfHash reads HGETALL's reply. No hash, one without an id, and times that cannot be read are no
// session.
func userOfHash(reply any, err error) (user User, _ error) {
	if err != nil {
		return User{}, err
	}
	fields, _ := reply.([]any)
	if err := redis.ScanStruct(fields, &user); err != nil {
		return User{}, unavailable(err)
	}
	var err1, err2 error
	user.CreatedAt, err1 = normalizeTime(user.CreatedAt)
	user.UpdatedAt, err2 = normalizeTime(user.UpdatedAt)
	if user.ID == "" || err1 != nil || err2 != nil {
		return User{}, errNoSession
	}
	return user, nil
}
