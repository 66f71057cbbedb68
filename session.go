// Sessions: what a session backend promises, the Redis backend, session ids and the cookie.

package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"expvar"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"path"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/gomodule/redigo/redis"
)

// SessionStore keeps sessions. It has no update: a store that writes a whole session back brings it to
// life again when a slow request does so after its sign-out. What is never rewritten cannot come back.
//
// Every method may be called from any goroutine, gives up within 3 s, and keeps "there is no such
// session" (errNoSession) apart from "I could not find out" (an error wrapping errUnavailable): the
// first signs a user out, the second must not.
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

var (
	errNoSession   = errors.New("no such session")
	errUnavailable = errors.New("store unavailable")
)

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
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func isUUID(s string) bool {
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return false
	}
	var b [16]byte
	_, err := hex.Decode(b[:], []byte(s[:8]+s[9:13]+s[14:18]+s[19:23]+s[24:]))
	return err == nil
}

const cookieName = "session-id"

// sessionID returns the session id in the request's cookie, or "" when there is none that could be one.
func sessionID(r *http.Request) string {
	cookie, err := r.Cookie(cookieName)
	if err != nil || !isUUID(cookie.Value) {
		return ""
	}
	return cookie.Value
}

// setSessionCookie sends the session cookie; an empty id clears it.
func (s *server) setSessionCookie(w http.ResponseWriter, id string) {
	maxAge := int(s.cfg.sessionTTL / time.Second)
	if id == "" {
		maxAge = -1 // written as Max-Age=0
	}
	http.SetCookie(w, &http.Cookie{
		Name: cookieName, Value: id, Path: "/", MaxAge: maxAge,
		HttpOnly: true, Secure: s.cfg.cookieSecure, SameSite: http.SameSiteLaxMode,
	})
}

// redisTarget is where sessions are: one Redis, or the primary of a name that sentinels know.
type redisTarget struct {
	scheme             string   // redis, rediss or redis-sentinel
	addrs              []string // host:port of the Redis, or of each sentinel
	primary            string   // its name, with sentinels only
	db                 int
	username, password string
}

const redisURLForms = "redis://[user:password@]host:port[/db], rediss://… for TLS, or " +
	"redis-sentinel://[user:password@]host:port[,host:port…]/primary[/db], special characters percent-encoded"

// parseRedisURL reads a URL of one of redisURLForms. net/url takes no list of hosts.
func parseRedisURL(value string) (t *redisTarget, ok bool) {
	form := regexp.MustCompile(`^(rediss?|redis-sentinel)://(?:([^:@/]*):([^@/]+)@)?([^@/?#]+)(?:/([^/?#]+))??(?:/(\d*))?$`)
	m := form.FindStringSubmatch(value)
	if m == nil {
		return nil, false
	}
	sentinels := m[1] == "redis-sentinel"
	if sentinels && m[5] == "" {
		m[5], m[6] = m[6], "" // a name of digits
	}
	username, err1 := url.PathUnescape(m[2])
	password, err2 := url.PathUnescape(m[3])
	db, err3 := strconv.Atoi(cmp.Or(m[6], "0"))
	t = &redisTarget{m[1], strings.Split(m[4], ","), m[5], db, username, password}
	for _, addr := range t.addrs {
		host, _, _ := net.SplitHostPort(addr)
		ok = host != "" && validAddr(addr) && (ok || addr == t.addrs[0])
	}
	return t, ok && cmp.Or(err1, err2, err3) == nil && sentinels == (t.primary != "") && (sentinels || len(t.addrs) == 1)
}

// redactURL takes whatever could be a password out of a URL that may be malformed.
func redactURL(value string) string {
	return regexp.MustCompile(`(?s)^([a-z-]+://)?.*@|[?#].*`).ReplaceAllString(value, "$1…")
}

// String is the URL without user and password.
func (t *redisTarget) String() string {
	return t.scheme + "://" + strings.Join(t.addrs, ",") + path.Join("/", t.primary, strconv.Itoa(t.db))
}

// dial connects to Redis, bounded by ctx. Sentinels are asked in turn at every dial, so that a failover
// asks for nothing else.
func (t *redisTarget) dial(ctx context.Context) (redis.Conn, error) {
	credentials := []redis.DialOption{redis.DialUsername(t.username), redis.DialPassword(t.password), redis.DialDatabase(t.db)}
	if t.primary == "" {
		return t.dialGuarded(ctx, t.addrs[0], credentials...)
	}
	var errs []error
	for _, sentinel := range t.addrs {
		addr, err := t.askSentinel(ctx, sentinel)
		if err != nil {
			errs = append(errs, fmt.Errorf("sentinel %s: %w", sentinel, err))
			continue
		}
		c, err := t.dialGuarded(ctx, addr, credentials...)
		if err == nil {
			// A sentinel that has not yet heard of a failover names the old primary, which its ROLE betrays.
			role, err := redis.Values(redis.DoContext(c, ctx, "ROLE"))
			if err == nil && len(role) > 0 && fmt.Sprintf("%s", role[0]) == "master" {
				return c, nil
			}
			c.Close()
		}
		errs = append(errs, fmt.Errorf("%s is no primary within reach (%v)", addr, err))
	}
	return nil, errors.Join(errs...)
}

// askSentinel returns the host:port of the primary as one sentinel knows it.
func (t *redisTarget) askSentinel(ctx context.Context, sentinel string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, sentinelTimeout)
	defer cancel()
	c, err := t.dialGuarded(ctx, sentinel)
	if err != nil {
		return "", err
	}
	defer c.Close()
	addr, err := redis.Strings(redis.DoContext(c, ctx, "SENTINEL", "get-master-addr-by-name", t.primary))
	if err != nil || len(addr) != 2 {
		return "", fmt.Errorf("primary %q is at %q: %v", t.primary, addr, err)
	}
	return net.JoinHostPort(addr[0], addr[1]), nil
}

func (t *redisTarget) dialGuarded(ctx context.Context, addr string, options ...redis.DialOption) (redis.Conn, error) {
	dial := new(net.Dialer).DialContext
	if t.scheme == "rediss" {
		dial = new(tls.Dialer).DialContext
	}
	return redis.DialContext(ctx, "tcp", addr, append(options, redis.DialContextFunc(
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
	budget int  // bytes of memory that replies may still claim before the next Write
	kind   byte // first byte of the line being read, 0 before it
	length int  // the number in that line so far
	skip   int  // bytes of a bulk string still to come
}

func (g *guardedConn) Write(p []byte) (int, error) {
	g.budget = maxReplies
	g.SetWriteDeadline(time.Now().Add(exchangeTimeout))
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

// How long and how much the Redis backend may take.
const (
	exchangeTimeout = 1000 * time.Millisecond // connecting, writing, reading and one retry
	waitTimeout     = 2000 * time.Millisecond // waiting for the batch before and for one's own
	sentinelTimeout = 250 * time.Millisecond  // for one sentinel to name the primary
	connLifetime    = time.Minute             // so that a failover behind a stable name is noticed
	lanes           = 2
	maxBatch        = 256
	maxWaiting      = 16384
	maxReplies      = 4 << 20 // bytes of memory for the replies of an exchange
	element         = 64      // bytes that redigo spends on a reply of any kind, at least
)

// redisSessions is the Redis backend: one hash a session, as the original program wrote them.
//
// Operations are batched: those that arrive while a batch is on the wire leave together as the next one,
// a group commit. Alone, an operation goes at once; under load hundreds share two system calls.
type redisSessions struct {
	target      *redisTarget
	metrics     *expvar.Map
	waiting     chan *operation
	stop        context.CancelFunc // of the lanes
	noncePrefix string
	nonces      atomic.Uint64
}

// operation is what one request wants of Redis. Its replies go to nobody else, and if the asker has left,
// to nobody.
type operation struct {
	cmds  []command
	since time.Time
	done  chan outcome // buffered, so that a lane never waits for the asker
}

type command []any // its name first

type outcome struct {
	replies []any // one for each command
	err     error // wraps errUnavailable
}

func newRedisSessions(target *redisTarget, metrics *expvar.Map) *redisSessions {
	ctx, stop := context.WithCancel(context.Background())
	s := &redisSessions{target: target, metrics: metrics, stop: stop,
		waiting: make(chan *operation, maxWaiting), noncePrefix: newUUID() + "-"}
	for range lanes {
		go (&lane{redisSessions: s}).run(ctx)
	}
	return s
}

func sessionKey(id string) string { return "session:" + id }

func (s *redisSessions) Create(ctx context.Context, id, replaced string, user User, ttl time.Duration) error {
	var cmds []command
	if replaced != "" {
		cmds = append(cmds, command{"DEL", sessionKey(replaced)})
	}
	cmds = append(cmds,
		command{"HSET", sessionKey(id), "id", user.ID, "name", user.Name, "email", user.Email,
			"createdAt", user.CreatedAt, "updatedAt", user.UpdatedAt},
		command{"EXPIRE", sessionKey(id), int64(ttl / time.Second)})
	replies, err := s.do(cmds...)
	if err == nil && replies[len(replies)-1] != any(int64(1)) {
		err = unavailable(fmt.Errorf("answers %v", replies))
	}
	if err != nil { // EXEC runs the rest when one command fails; without EXPIRE the session would not end
		s.start(command{"DEL", sessionKey(id)})
		return fmt.Errorf("creating session: %w", err)
	}
	return nil
}

func (s *redisSessions) Get(ctx context.Context, id string) (User, error) {
	replies, err := s.do(command{"HGETALL", sessionKey(id)})
	if err != nil {
		return User{}, fmt.Errorf("looking a session up: %w", err)
	}
	return userOfHash(replies[0])
}

func (s *redisSessions) Delete(ctx context.Context, id string) error {
	if _, err := s.do(command{"DEL", sessionKey(id)}); err != nil {
		return fmt.Errorf("deleting session: %w", err)
	}
	return nil
}

func (s *redisSessions) Ping(ctx context.Context) error {
	_, err := s.do()
	return err
}

func (s *redisSessions) Close() error {
	s.stop()
	return nil
}

// do returns a reply for each command. It does not end with the request's context: a lane answers in
// time, and waiting for either would cost more than the whole lookup.
func (s *redisSessions) do(cmds ...command) ([]any, error) {
	o := <-s.start(cmds...).done
	return o.replies, o.err
}

func (s *redisSessions) start(cmds ...command) *operation {
	op := &operation{cmds, time.Now(), make(chan outcome, 1)}
	select {
	case s.waiting <- op:
	default:
		op.done <- outcome{nil, unavailable(errors.New("too many wait for Redis"))}
	}
	return op
}

// lane sends one batch after another, on one connection at a time.
type lane struct {
	*redisSessions
	conn   redis.Conn // nil before the first exchange and after one that failed
	dialed time.Time
}

func (l *lane) run(ctx context.Context) {
	for {
		var batch []*operation
		select {
		case op := <-l.waiting:
			batch = append(batch, op)
		case <-ctx.Done():
			l.hangUp()
			return
		}
		runtime.Gosched() // requests that are ready to run come first, and into this batch

		for range min(len(l.waiting), maxBatch-1) { // the other lane may take some of them
			select {
			case op := <-l.waiting:
				batch = append(batch, op)
			default:
			}
		}
		l.serve(batch)
	}
}

func (l *lane) hangUp() {
	if l.conn != nil {
		l.conn.Close()
		l.conn = nil
	}
}

// serve answers a batch. What fails on a connection that turned out dead or out of step, or on a server
// that no longer is the primary, is tried once more on a fresh connection: all that this store does can
// be done twice.
func (l *lane) serve(batch []*operation) {
	l.metrics.Add("sessionBatches", 1)
	deadline := time.Now().Add(exchangeTimeout)
	if latest := batch[0].since.Add(waitTimeout); latest.Before(deadline) {
		deadline = latest
	}
	replies, err := l.exchange(deadline, batch)
	if err != nil && time.Now().Before(deadline) {
		replies, err = l.exchange(deadline, batch)
	}
	if refused := redis.Error(""); errors.As(err, &refused) && len(batch) > 1 {
		for i := range batch { // a full Redis refuses every transaction, and still answers reads
			l.serve(batch[i : i+1])
		}
		return
	}
	for _, op := range batch {
		if err != nil {
			op.done <- outcome{nil, unavailable(err)}
		} else {
			op.done <- outcome{replies[:len(op.cmds)], nil}
			replies = replies[len(op.cmds):]
		}
	}
}

// exchange sends the commands of a batch in one round trip and returns a reply for each. Several are a
// transaction, so that their replies come back as one, EXEC's, within which nothing can be lost, repeated
// or swapped on the way. After an error the connection is closed.
func (l *lane) exchange(deadline time.Time, batch []*operation) (replies []any, err error) {
	defer func() {
		if err != nil {
			l.hangUp()
		}
	}()
	if l.conn == nil || time.Since(l.dialed) > connLifetime {
		l.hangUp()
		ctx, cancel := context.WithDeadline(context.Background(), deadline)
		defer cancel()
		if l.conn, err = l.target.dial(ctx); err != nil {
			return nil, err
		}
		l.dialed = time.Now()
	}
	var cmds []command
	for _, op := range batch {
		cmds = append(cmds, op.cmds...)
	}
	nonce := l.noncePrefix + strconv.FormatUint(l.nonces.Add(1), 36)
	sent := append(slices.Clip(cmds), command{"PING", nonce})
	if len(cmds) > 1 {
		sent = slices.Concat([]command{{"MULTI"}}, sent, []command{{"EXEC"}})
	}
	for _, cmd := range sent {
		l.conn.Send(cmd[0].(string), cmd[1:]...)
	}
	all, err := redis.Values(redis.DoWithTimeout(l.conn, max(1, time.Until(deadline)), "")) // any failed Send shows here
	if err != nil {
		return nil, err
	}
	return proven(all, cmds, nonce)
}

// proven returns the reply to each of cmds, taken from all that came back. An exchange proves itself: its
// last command is a PING with a value never used before. Unless that comes back in its place nothing is
// believed: a connection that is a single reply out of step would hand each client the session of the one
// before it. Nor is a reply believed that its command cannot have.
func proven(all []any, cmds []command, nonce string) ([]any, error) {
	replies := all
	if len(cmds) > 1 {
		replies, _ = all[len(all)-1].([]any)
	}
	for _, reply := range slices.Concat(all, replies) {
		if refused, ok := reply.(redis.Error); ok && !isWrongType(reply) {
			return nil, refused
		}
	}
	if len(replies) != len(cmds)+1 || fmt.Sprintf("%s", replies[len(cmds)]) != nonce {
		return nil, errors.New("redis replies out of step")
	}
	for i, cmd := range cmds {
		_, isInt := replies[i].(int64)
		_, isArray := replies[i].([]any)
		if isHash := isArray || isWrongType(replies[i]); isInt == isHash || isHash != (cmd[0] == "HGETALL") {
			return nil, fmt.Errorf("%s answered %T", cmd[0], replies[i]) // not %v: it could be another's hash
		}
	}
	return replies[:len(cmds)], nil
}

func isWrongType(reply any) bool {
	refused, ok := reply.(redis.Error)
	return ok && strings.HasPrefix(string(refused), "WRONGTYPE")
}

// userOfHash reads HGETALL's reply. No hash, one without an id, and times that cannot be read are no
// session.
func userOfHash(reply any) (user User, err error) {
	if isWrongType(reply) {
		return User{}, errNoSession
	}
	fields, err := redis.Values(reply, nil)
	if err == nil {
		err = redis.ScanStruct(fields, &user)
	}
	if err != nil {
		return User{}, unavailable(fmt.Errorf("HGETALL: %w", err))
	}
	var err1, err2 error
	user.CreatedAt, err1 = normalizeTime(user.CreatedAt)
	user.UpdatedAt, err2 = normalizeTime(user.UpdatedAt)
	if user.ID == "" || err1 != nil || err2 != nil {
		return User{}, errNoSession
	}
	return user, nil
}
