// Sessions: what a session backend promises, session ids and times, and the Redis backend.

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
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
//
// Each server has a pipeline: one connection that all requests share. Where Redis is a cluster, the cluster
// tells which pipeline a session is asked for on.
type redisSessions struct {
	cluster *cluster
	stats   *redisStats
}

// redisStats counts since the start, over all servers.
type redisStats struct {
	operations   atomic.Int64
	flushes      atomic.Int64
	retries      atomic.Int64
	redirections atomic.Int64
	dials        atomic.Int64
}

func newRedisSessions(target *redisTarget, log *slog.Logger) *redisSessions {
	stats := &redisStats{}
	return &redisSessions{cluster: newCluster(target, stats, log), stats: stats}
}

// metrics returns what was counted since the start, and how many operations wait to be sent.
func (s *redisSessions) metrics() map[string]int64 {
	return map[string]int64{
		"redis_operations_total":   s.stats.operations.Load(),
		"redis_flushes_total":      s.stats.flushes.Load(),
		"redis_retries_total":      s.stats.retries.Load(),
		"redis_redirections_total": s.stats.redirections.Load(),
		"redis_dials_total":        s.stats.dials.Load(),
		"redis_queue":              int64(s.cluster.queued()),
	}
}

func sessionKey(id string) string { return "session:" + id }

// Create is never sent twice: a first try that arrives late could bring the session back after its DEL.
func (s *redisSessions) Create(ctx context.Context, id string, user User, ttl time.Duration) error {
	key := sessionKey(id)
	creation := &creation{key: key, user: user, ttl: int64(ttl / time.Second)}
	err := s.cluster.do(ctx, s.cluster.nodeOf(key), creation, 1)
	if errors.Is(err, errRefused) {
		// Part of it may have been done: EXEC does not roll back, and after a refused MULTI the rest runs
		// singly. What this leaves behind expires, should the deletion fail.
		s.Delete(ctx, id)
	}
	return err
}

func (s *redisSessions) Get(ctx context.Context, id string) (User, error) {
	key := sessionKey(id)
	lookup := &lookup{key: key}
	if err := s.cluster.do(ctx, s.cluster.nodeOf(key), lookup, 2); err != nil {
		if isRefusal(err, "WRONGTYPE") {
			return User{}, errNoSession // the key holds something else than a hash
		}
		return User{}, err
	}
	if lookup.user.ID == "" {
		return User{}, errNoSession
	}
	return lookup.user, nil
}

func (s *redisSessions) Delete(ctx context.Context, id string) error {
	key := sessionKey(id)
	deletion := &deletion{key: key}
	if err := s.cluster.do(ctx, s.cluster.nodeOf(key), deletion, 2); err != nil {
		return err
	}
	if deletion.deleted == 0 {
		return errNoSession
	}
	return nil
}

// Ping returns nil when any server of a cluster answers.
func (s *redisSessions) Ping(ctx context.Context) error {
	return s.cluster.ping(ctx)
}

func (s *redisSessions) Close() error {
	s.cluster.close()
	return nil
}

// request is what an operation asks of Redis, and what becomes of the replies.
type request interface {
	send(conn redis.Conn) // encodes the commands; an error of conn shows in its Flush
	read(r *replyReader)  // reads a reply for each command; is called again for a second try
}

// creation is one transaction on one key, so that no session can be left without an end.
type creation struct {
	key  string
	user User
	ttl  int64 // seconds
}

func (c *creation) send(conn redis.Conn) {
	conn.Send("MULTI")
	conn.Send("HSET", c.key, "id", c.user.ID, "name", c.user.Name, "email", c.user.Email,
		"createdAt", c.user.CreatedAt, "updatedAt", c.user.UpdatedAt)
	conn.Send("EXPIRE", c.key, c.ttl)
	conn.Send("EXEC")
}

func (c *creation) read(r *replyReader) {
	r.status("OK")
	for range 2 { // HSET and EXPIRE
		if r.refusal == "" {
			r.status("QUEUED")
		} else {
			r.skip() // after a refused MULTI they are no part of a transaction
		}
	}
	if r.refusal != "" {
		r.skip()
		return
	}
	if !r.array(2) {
		return
	}
	r.number(':')
	if r.number(':') != 1 && r.ok() {
		r.refusal = "EXPIRE has not set the session's end"
	}
}

type lookup struct {
	key  string
	user User // without an id: there is no session
}

func (l *lookup) send(conn redis.Conn) { conn.Send("HGETALL", l.key) }

func (l *lookup) read(r *replyReader) {
	var user User
	var createdAt, updatedAt, updateAt string
	n := r.number('*')
	if n%2 != 0 && r.ok() {
		r.fail(errReplyShape)
	}
	for ; n > 0 && r.err == nil; n -= 2 {
		var field *string
		switch string(r.bulk()) {
		case "id":
			field = &user.ID
		case "name":
			field = &user.Name
		case "email":
			field = &user.Email
		case "createdAt":
			field = &createdAt
		case "updatedAt":
			field = &updatedAt
		case "updateAt": // the original's
			field = &updateAt
		}
		if field == nil {
			r.skip()
		} else {
			*field = string(r.bulk())
		}
	}
	user.CreatedAt, user.UpdatedAt = userTimes(parseSessionTime, createdAt, updatedAt, updateAt)
	l.user = user
}

type deletion struct {
	key     string
	deleted int // keys
}

func (d *deletion) send(conn redis.Conn) { conn.Send("DEL", d.key) }
func (d *deletion) read(r *replyReader)  { d.deleted = r.number(':') }

// ping sends nothing: the ECHO that ends every flush is enough.
type ping struct{}

func (ping) send(redis.Conn)   {}
func (ping) read(*replyReader) {}

// asking is a request to a node of a cluster that is about to take over the key's slot. ASKING holds for the
// next command, or the transaction that it begins.
type asking struct {
	request
}

func (a asking) send(conn redis.Conn) {
	conn.Send("ASKING")
	a.request.send(conn)
}

func (a asking) read(r *replyReader) {
	r.status("OK")
	a.request.read(r)
}

// The worst that an operation can take is 2 s: operationTimeout until it is sent, and then replyTimeout.
const (
	operationTimeout = time.Second      // past it an operation is not sent any more
	replyTimeout     = time.Second      // from sending a flush to its last reply
	connectTimeout   = 10 * time.Second // name, TCP, TLS, login and first ECHO together
	sentinelTimeout  = time.Second / 2  // asking one sentinel
	attemptInterval  = time.Second      // between attempts to connect while none has succeeded
	attemptPause     = time.Second / 10 // after one that failed
	expiryInterval   = time.Second / 10 // of looking for operations that have waited too long
	minAge           = time.Second      // of a connection that is ended when Redis is no primary
	maxQueued        = 8192             // operations that wait to be sent
	maxReply         = 256 << 10        // bytes of an operation's replies; the original's need 200 kB
	slotCount        = 16384            // of a cluster
	maxRedirections  = 5                // of one operation in it
)

var (
	errClosed     = errors.New("the session store is closed")
	errQueueFull  = errors.New("too many requests wait for Redis")
	errNoTime     = errors.New("no time is left for Redis")
	errBlocked    = errors.New("what was sent before has not been read in time")
	errConnecting = errors.New("connecting takes longer than a request can wait")
	errHungUp     = errors.New("closed the connection")
	errReplyShape = errors.New("a reply of the wrong shape")
	errReplySize  = errors.New("a reply larger than any session")
	errOutOfStep  = errors.New("replies out of step")
	errNoPrimary  = errors.New("is no primary")

	errNotInCharge = errors.New("is no primary any more, or no node of its cluster")
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

// isRefusal tells whether err is what Redis refused with an error of this kind, such as "WRONGTYPE".
func isRefusal(err error, kind string) bool {
	refusal, ok := errors.AsType[*refusedError](err)
	return ok && strings.HasPrefix(refusal.text, kind)
}

// operation is a request on its way.
type operation struct {
	request
	deadline time.Time  // past it the operation is not sent any more
	sends    int        // how often it may still be sent
	conn     *redisConn // that it was sent on last

	done chan struct{}
	err  error // to be read when done is closed: nil, or an errUnavailable
}

// again tells whether the operation may be sent once more after err. What timed out may not: the server is
// slow enough without.
func (op *operation) again(err error) bool {
	return op.sends > 0 && !errors.Is(err, os.ErrDeadlineExceeded) && time.Now().Before(op.deadline)
}

// finish ends the operation, with nil when its request has read the replies.
func (op *operation) finish(err error) {
	if err != nil && !errors.Is(err, errUnavailable) {
		err = fmt.Errorf("%w: %w", errUnavailable, err)
	}
	op.err = err
	close(op.done)
}

// cluster finds the server to ask for a key: the entry, or where Redis is a cluster the node that has the
// key's slot. Where a slot is, it learns from Redis's redirections, one slot at a time. What it does not know
// it asks the entry. https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/
type cluster struct {
	target *redisTarget
	stats  *redisStats
	log    *slog.Logger
	entry  *pipeline // to the first server of REDIS_URL that answers

	mu     sync.Mutex
	nodes  map[string]*pipeline // by host:port; empty until Redis redirects
	slots  [slotCount]*pipeline // the node of each slot that is known
	closed bool
}

func newCluster(target *redisTarget, stats *redisStats, log *slog.Logger) *cluster {
	c := &cluster{
		target: target,
		stats:  stats,
		log:    log,
		nodes:  map[string]*pipeline{},
	}
	c.entry = newPipeline(target.String(), stats, func(ctx context.Context, first int) (*redisConn, error) {
		return target.dial(ctx, c.addresses(), first)
	})
	return c
}

// do sends a request to a server, at most sends times, and to others as Redis redirects it. It returns when
// the replies are read. Cancelling ctx does nothing, as watching for that would cost more than a lookup
// takes; its deadline is kept.
func (c *cluster) do(ctx context.Context, server *pipeline, req request, sends int) error {
	c.stats.operations.Add(1)
	deadline := time.Now().Add(operationTimeout)
	if end, ok := ctx.Deadline(); ok && end.Add(-replyTimeout).Before(deadline) {
		deadline = end.Add(-replyTimeout)
	}
	next := req
	cause := fmt.Errorf("%w: more than %d redirections", errUnavailable, maxRedirections)
	for range 1 + maxRedirections {
		op := &operation{request: next, deadline: deadline, sends: sends, done: make(chan struct{})}
		server.do(op)
		if op.err == nil {
			return nil
		}
		if !errors.Is(op.err, errRefused) {
			cause = op.err // to this node the others may go on redirecting
		}
		var ask bool
		server, ask = c.redirect(server, op)
		if server == nil {
			return op.err
		}
		c.stats.redirections.Add(1)
		next = req
		if ask {
			next = asking{req}
		}
	}
	return cause
}

// ping asks the entry, and when that does not answer the other nodes that are connected.
func (c *cluster) ping(ctx context.Context) error {
	err := c.do(ctx, c.entry, ping{}, 2)
	if err == nil {
		return nil
	}
	c.mu.Lock()
	nodes := slices.Collect(maps.Values(c.nodes))
	c.mu.Unlock()
	for _, node := range nodes {
		if node.stands() && c.do(ctx, node, ping{}, 2) == nil {
			return nil
		}
	}
	return err
}

// redirect returns the server to which an operation that failed is to be sent next, nil for none, and whether
// ASKING goes before it. A redirection means that nothing was done.
func (c *cluster) redirect(from *pipeline, op *operation) (to *pipeline, ask bool) {
	if refusal, ok := errors.AsType[*refusedError](op.err); ok {
		kind, slot, addr := parseRedirection(refusal)
		switch kind {
		case "MOVED":
			to := c.moved(slot, addr)
			if to == from {
				// An address that stands for several machines: the next connection may reach the right one.
				op.conn.fail(errors.New("sends the slot's requests to itself"))
			}
			return to, false
		case "ASK":
			return c.node(addr), true
		}
		if from != c.entry && strings.HasPrefix(refusal.text, "CLUSTERDOWN") {
			c.forget(from) // it may have left the cluster
			return c.entry, false
		}
		return nil, false
	}
	if from == c.entry || from.stands() {
		return nil, false
	}
	c.forget(from)
	if !op.again(op.err) {
		return nil, false
	}
	return c.entry, false
}

// nodeOf returns the server to ask for a key, the entry if that is not known.
func (c *cluster) nodeOf(key string) *pipeline {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.nodes) == 0 {
		return c.entry
	}
	if node := c.slots[slotOf(key)]; node != nil {
		return node
	}
	return c.entry
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

// moved notes the node of a slot, as another node told it, and returns it.
func (c *cluster) moved(slot int, addr string) *pipeline {
	node := c.node(addr)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.slots[slot] = node
	return node
}

// node returns the pipeline to a node.
func (c *cluster) node(addr string) *pipeline {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.nodes) == 0 {
		c.log.Info("Redis is a cluster", "node", addr)
	}
	node := c.nodes[addr]
	if node == nil {
		node = newPipeline(addr, c.stats, func(ctx context.Context, _ int) (*redisConn, error) {
			return c.target.dialServer(ctx, addr)
		})
		if c.closed {
			node.close()
		}
		c.nodes[addr] = node
	}
	return node
}

// forget drops what is known of the slots of a node that is lost. Others tell where they went.
func (c *cluster) forget(lost *pipeline) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for slot, node := range c.slots[:] {
		if node == lost {
			c.slots[slot] = nil
		}
	}
}

// addresses returns those of the entry: the ones in REDIS_URL, and then all that redirections have named.
func (c *cluster) addresses() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	addrs := slices.Clone(c.target.addrs)
	for _, addr := range slices.Sorted(maps.Keys(c.nodes)) {
		if !slices.Contains(addrs, addr) {
			addrs = append(addrs, addr)
		}
	}
	return addrs
}

// queued returns how many operations wait to be sent.
func (c *cluster) queued() int {
	n := c.entry.queued()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, node := range c.nodes {
		n += node.queued()
	}
	return n
}

func (c *cluster) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	c.entry.close()
	for _, node := range c.nodes {
		node.close()
	}
}

// pipeline sends operations to a server over one connection. They are queued (add). One goroutine at a time
// sends all that are queued, as a flush (sendQueued). Another reads the replies in order and hands them out
// (receive). No operation waits for another's reply, nor for a connection longer than for its own deadline.
type pipeline struct {
	name    string // of the server, for messages
	dial    func(ctx context.Context, first int) (*redisConn, error)
	stats   *redisStats
	closing context.Context // ends with close
	stop    context.CancelFunc

	mu       sync.Mutex
	queue    []*operation
	sending  bool       // a goroutine sends what is queued
	dialing  bool       // a goroutine connects
	conn     *redisConn // nil when none stands
	failed   error      // of the last attempt to connect
	failedAt time.Time
	first    int // where the next attempt to connect begins in the list of addresses
}

func newPipeline(
	name string, stats *redisStats, dial func(ctx context.Context, first int) (*redisConn, error),
) *pipeline {
	p := &pipeline{name: name, dial: dial, stats: stats}
	p.closing, p.stop = context.WithCancel(context.Background())
	return p
}

// do has an operation sent, and returns when it is finished.
func (p *pipeline) do(op *operation) {
	p.add(op)
	<-op.done
}

// add queues an operation, or finishes it if it can only fail.
func (p *pipeline) add(op *operation) {
	p.mu.Lock()
	err := p.enqueue(op)
	p.mu.Unlock()
	if err != nil {
		op.finish(err)
	}
}

// enqueue queues an operation and sees to it that somebody sends it. The caller holds p.mu.
func (p *pipeline) enqueue(op *operation) error {
	now := time.Now()
	switch {
	case p.closing.Err() != nil:
		return errClosed
	case !now.Before(op.deadline):
		return fmt.Errorf("%s: %w", p.name, errNoTime)
	case len(p.queue) >= maxQueued:
		return fmt.Errorf("%s: %w", p.name, errQueueFull)
	case p.conn == nil && p.failed != nil && now.Sub(p.failedAt) < attemptPause:
		return p.failed
	}
	p.queue = append(p.queue, op)
	p.wake()
	return nil
}

// wake starts the goroutine that what is queued needs, unless it runs. The caller holds p.mu.
func (p *pipeline) wake() {
	switch {
	case len(p.queue) == 0:
	case p.conn == nil && !p.dialing:
		p.dialing = true
		go p.connect()
	case p.conn != nil && !p.sending:
		p.sending = true
		go p.sendQueued()
	}
}

// sendQueued sends what is queued, until nothing is or the connection ends.
func (p *pipeline) sendQueued() {
	for {
		runtime.Gosched() // requests that are ready to run join this flush
		p.mu.Lock()
		p.expire(errBlocked)
		conn := p.conn
		operations := p.queue
		if conn == nil || len(operations) == 0 {
			p.sending = false
			p.mu.Unlock()
			return
		}
		p.queue = make([]*operation, 0, len(operations))
		p.mu.Unlock()
		conn.send(operations)
	}
}

// expire finishes what is queued and past its deadline. The caller holds p.mu.
func (p *pipeline) expire(cause error) {
	now := time.Now()
	p.queue = slices.DeleteFunc(p.queue, func(op *operation) bool {
		expired := !now.Before(op.deadline)
		if expired {
			op.finish(fmt.Errorf("%s: %w", p.name, cause))
		}
		return expired
	})
}

// connect dials until a connection stands, or all attempts have failed. A further attempt starts each
// attemptInterval while operations wait, at the next address, and the first connection to stand is used.
func (p *pipeline) connect() {
	ctx, cancel := context.WithCancel(p.closing)
	defer cancel() // ends the attempts that are late
	p.mu.Lock()
	first := p.first
	p.mu.Unlock()
	attempts := make(chan dialed)
	started := 0
	ended := 0
	start := func() {
		go p.attempt(ctx, first+started, attempts)
		started++
	}
	start()
	next := time.NewTicker(attemptInterval)
	defer next.Stop()
	expiry := time.NewTicker(expiryInterval)
	defer expiry.Stop()
	for {
		select {
		case a := <-attempts:
			ended++
			if p.connected(a, ended == started) {
				return
			}
		case <-next.C:
			if p.queued() > 0 {
				start()
			}
		case <-expiry.C:
			p.mu.Lock()
			p.expire(errConnecting)
			p.mu.Unlock()
		case <-ctx.Done():
			return
		}
	}
}

// dialed is what came of one attempt to connect.
type dialed struct {
	first int // where it began in the list of addresses
	conn  *redisConn
	err   error
}

func (p *pipeline) attempt(ctx context.Context, first int, attempts chan<- dialed) {
	p.stats.dials.Add(1)
	dialCtx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	conn, err := p.dial(dialCtx, first)
	select {
	case attempts <- dialed{first, conn, err}:
	case <-ctx.Done(): // another one was first, or the store is closed
		if err == nil {
			closeNow(conn.socket)
		}
	}
}

// connected takes what came of an attempt into use: the connection, or the error for all that wait. It tells
// whether connecting is over, which it is with a connection or after the last attempt.
func (p *pipeline) connected(a dialed, last bool) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dialing = a.err != nil && !last
	if a.err != nil {
		// A login that was refused is no refusal of what waits: none of that was sent.
		p.failed = fmt.Errorf("%w: %v", errUnavailable, a.err)
		p.failedAt = time.Now()
		for _, op := range p.queue {
			op.finish(p.failed)
		}
		p.queue = nil
		return last
	}
	if p.closing.Err() != nil {
		closeNow(a.conn.socket)
		return true
	}
	a.conn.pipeline = p
	p.conn = a.conn
	p.failed = nil
	p.first = a.first
	go a.conn.receive()
	p.wake()
	return true
}

// leave takes a connection that has ended out of use. One that hung, or to a server that is none to ask any
// more, is followed by one to another address, if there is any.
func (p *pipeline) leave(conn *redisConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.conn == conn {
		p.conn = nil
		if errors.Is(conn.err, os.ErrDeadlineExceeded) || errors.Is(conn.err, errNotInCharge) {
			p.first++
		}
	}
	p.wake()
}

// settle settles what was in flight on a connection that has ended. The culprit is not sent again.
func (p *pipeline) settle(conn *redisConn, culprit *operation) {
	for _, f := range conn.inFlight {
		for _, op := range f.operations {
			if op == culprit || !op.again(conn.err) {
				op.finish(conn.err)
				continue
			}
			p.stats.retries.Add(1)
			p.add(op)
		}
	}
}

// stands tells whether there is a connection.
func (p *pipeline) stands() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.conn != nil
}

func (p *pipeline) queued() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.queue)
}

func (p *pipeline) close() {
	p.mu.Lock()
	p.stop()
	queue := p.queue
	p.queue = nil
	conn := p.conn
	p.mu.Unlock()
	for _, op := range queue {
		op.finish(errClosed)
	}
	if conn != nil {
		conn.fail(errClosed)
	}
}

// redisConn is a connection, and what was sent on it and is not answered yet.
type redisConn struct {
	pipeline *pipeline
	server   string // host:port
	user     string // that is logged in, "" for the default one
	socket   net.Conn
	encoder  redis.Conn
	replies  replyReader
	since    time.Time
	nonce    string // never used before; each flush adds its number
	flushes  int    // so far; only the sender counts

	mu       sync.Mutex
	inFlight []*flush // the oldest first
	err      error    // why it ended; nothing is sent then
}

// flush is a batch of operations that are sent together. It ends in an ECHO of a nonce: unless that comes
// back in its place none of the replies is believed. A connection that is a single reply out of step would
// hand each client the session of the one before it. The order of replies within a flush is trusted.
type flush struct {
	operations []*operation
	refusals   []string // the first one of each operation, "" for none
	nonce      string
	deadline   time.Time
}

func newRedisConn(server string, socket net.Conn) *redisConn {
	c := &redisConn{
		server:  server,
		socket:  socket,
		encoder: redis.NewConn(openSocket{socket}, 0, 0),
		since:   time.Now(),
		nonce:   rand.Text(),
	}
	c.replies.in = bufio.NewReaderSize(socket, 16<<10)
	return c
}

// openSocket is a socket that redigo does not close when it cannot write: fail does, and knows why.
type openSocket struct {
	net.Conn
}

func (openSocket) Close() error { return nil }

// send sends operations as a flush. Only one goroutine at a time may call it.
//
// The deadline of the oldest flush in flight holds for writing too. Under TLS a blocked write also blocks
// the reader, which has an alert to send.
func (c *redisConn) send(operations []*operation) {
	c.flushes++
	f := &flush{
		operations: operations,
		refusals:   make([]string, len(operations)),
		nonce:      c.nonce + strconv.Itoa(c.flushes),
		deadline:   time.Now().Add(replyTimeout),
	}
	if !c.begin(f) {
		c.pipeline.leave(c) // before its reader does, which may take a moment
		for _, op := range operations {
			c.pipeline.add(op)
		}
		return
	}
	c.pipeline.stats.flushes.Add(1)
	for _, op := range operations {
		op.send(c.encoder)
	}
	c.encoder.Send("ECHO", f.nonce)
	if err := c.encoder.Flush(); err != nil {
		c.fail(err)
	}
}

// begin puts a flush in flight. It is false when the connection has ended.
func (c *redisConn) begin(f *flush) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return false
	}
	for _, op := range f.operations {
		op.sends--
		op.conn = c
	}
	c.inFlight = append(c.inFlight, f)
	if len(c.inFlight) == 1 {
		c.socket.SetDeadline(f.deadline)
	}
	return true
}

// receive reads the replies to what was sent, flush after flush, until the connection ends. It reads when
// nothing is in flight, too, so a server that hangs up is noticed at once.
//
// Nobody else settles what was in flight. While receive reads into an operation, another connection must not.
func (c *redisConn) receive() {
	var culprit *operation
	for c.replies.err == nil {
		culprit = c.receiveFlush()
	}
	c.fail(c.replies.err)
	c.pipeline.leave(c)
	c.pipeline.settle(c, culprit)
}

// oldest returns the flush whose replies come next, nil if nothing is in flight.
func (c *redisConn) oldest() *flush {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.inFlight) == 0 {
		return nil
	}
	return c.inFlight[0]
}

// receiveFlush waits for the replies to a flush and its proof, and delivers them. After an error of c.replies
// they are worth nothing, and the culprit is the operation with a malformed reply or one too large.
func (c *redisConn) receiveFlush() (culprit *operation) {
	c.replies.kind()
	f := c.oldest()
	if f == nil {
		c.replies.fail(errOutOfStep) // a reply that nobody has asked for
		return nil
	}
	for i, op := range f.operations {
		c.replies.begin()
		op.read(&c.replies)
		if errors.Is(c.replies.err, errReplyShape) || errors.Is(c.replies.err, errReplySize) {
			return op
		}
		f.refusals[i] = c.replies.refusal
	}
	c.replies.begin()
	proof := string(c.replies.bulk())
	if c.replies.refusal != "" {
		c.replies.fail(c.refused(c.replies.refusal))
	} else if proof != f.nonce {
		c.replies.fail(errOutOfStep)
	}
	if c.replies.err == nil {
		c.replies.fail(c.end())
	}
	if c.replies.err == nil {
		c.deliver(f)
	}
	return nil
}

// end takes the oldest flush out of flight, unless the connection has ended.
func (c *redisConn) end() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	c.inFlight = c.inFlight[1:]
	var deadline time.Time // none
	if len(c.inFlight) > 0 {
		deadline = c.inFlight[0].deadline
	}
	c.socket.SetDeadline(deadline)
	return nil
}

// deliver finishes the operations of a flush that is proved. A server that was the primary before a failover,
// or a node that its cluster has dropped, says so: then the connection ends, and the next one finds another.
func (c *redisConn) deliver(f *flush) {
	inCharge := true
	for i, op := range f.operations {
		text := f.refusals[i]
		if text == "" {
			op.finish(nil)
			continue
		}
		if strings.HasPrefix(text, "READONLY") || strings.HasPrefix(text, "CLUSTERDOWN") {
			inCharge = false
		}
		op.finish(c.refused(text))
	}
	if !inCharge && time.Since(c.since) > minAge {
		c.fail(errNotInCharge)
	}
}

// refused returns the error for what the server has refused.
func (c *redisConn) refused(text string) error {
	return &refusedError{server: c.server, user: c.user, text: text}
}

// fail ends the connection. Every connection ends here, and the first error wins.
func (c *redisConn) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = fmt.Errorf("%s: %w", c.server, err)
		closeNow(c.socket)
	}
}

// ask sends a command and has its reply read, while the connection is made and nothing else is on its way.
// What Redis refuses is an error of the stream then.
func (c *redisConn) ask(read func(*replyReader), command string, args ...any) {
	if c.replies.err != nil {
		return // an earlier command failed
	}
	c.encoder.Send(command, args...)
	c.replies.begin()
	c.replies.fail(c.encoder.Flush())
	read(&c.replies)
	err := c.replies.err
	if c.replies.refusal != "" {
		err = c.refused(c.replies.refusal)
	}
	if err != nil {
		c.replies.err = fmt.Errorf("%s: %w", command, err)
	}
}

// closeNow closes a socket without waiting until TLS has said goodbye.
func closeNow(socket net.Conn) {
	if conn, ok := socket.(*tls.Conn); ok {
		socket = conn.NetConn()
	}
	socket.Close()
}

// replyReader reads replies of RESP 2, https://redis.io/docs/latest/develop/reference/protocol-spec/. Each
// method reads one reply. Two errors stay until they are looked at: what Redis refused, which is the trouble
// of one operation, and what is wrong with the stream. (redigo's reader allocates what a reply announces.)
type replyReader struct {
	in      *bufio.Reader
	budget  int    // bytes that may still be read for this operation
	refusal string // the first error that Redis answered to this operation, "" for none
	err     error  // the connection is worth nothing any more; no method reads after it
}

// begin begins the replies to an operation.
func (r *replyReader) begin() {
	r.budget = maxReply
	r.refusal = ""
}

// ok tells whether neither error has come.
func (r *replyReader) ok() bool { return r.err == nil && r.refusal == "" }

// fail notes an error of the stream, if it is one. The first one stays.
func (r *replyReader) fail(err error) {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = errHungUp
	}
	if r.err == nil {
		r.err = err
	}
}

// kind waits for a reply and returns its first byte, which stays unread.
func (r *replyReader) kind() byte {
	first, err := r.in.Peek(1)
	r.fail(err)
	if r.err != nil {
		return 0
	}
	return first[0]
}

// line reads the first line of a reply of the given kind and returns what follows the kind. It is nil if
// Redis refused. The next read overwrites it.
func (r *replyReader) line(kind byte) []byte {
	if r.err != nil {
		return nil
	}
	line, err := r.in.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		err = errReplySize
	}
	text, whole := bytes.CutSuffix(line, []byte("\r\n"))
	if err == nil && (!whole || len(text) < 2 || text[0] != kind && text[0] != '-') {
		err = errReplyShape
	}
	r.fail(err)
	if !r.spend(len(line)) {
		return nil
	}
	if text[0] == '-' && r.refusal == "" {
		r.refusal = string(text[1:])
	}
	if text[0] != kind {
		return nil
	}
	return text[1:]
}

// spend takes n bytes out of the budget. It is false after an error of the stream, such as too many bytes.
func (r *replyReader) spend(n int) bool {
	if n > r.budget {
		r.fail(errReplySize)
	}
	r.budget -= n
	return r.err == nil
}

// number reads an integer (':'), none of which is negative here, or the number that begins an array ('*') or
// a bulk string ('$'). Null, a refusal and an error of the stream are -1.
func (r *replyReader) number(kind byte) int {
	line := r.line(kind)
	if line == nil {
		return -1
	}
	n, err := strconv.Atoi(string(line))
	if err != nil || n < -1 || n == -1 && kind == ':' {
		r.fail(errReplyShape)
		return -1
	}
	return n
}

// array reads the beginning of an array, which has to have this many elements. It is false if Redis refused
// or the stream failed.
func (r *replyReader) array(elements int) bool {
	n := r.number('*')
	if n != elements && r.ok() {
		r.fail(errReplyShape)
	}
	return n == elements
}

// status reads a status, which has to be this one.
func (r *replyReader) status(text string) {
	if line := r.line('+'); line != nil && string(line) != text {
		r.fail(errReplyShape)
	}
}

// bulk returns a bulk string, which the next read overwrites. Null is nil.
func (r *replyReader) bulk() []byte {
	n := r.number('$')
	if n < 0 || !r.spend(n) {
		return nil
	}
	n += len("\r\n")
	text, err := r.in.Peek(n)
	if errors.Is(err, bufio.ErrBufferFull) {
		text = make([]byte, n)
		_, err = io.ReadFull(r.in, text)
	} else if err == nil {
		_, err = r.in.Discard(n)
	}
	r.fail(err)
	if r.err != nil {
		return nil
	}
	return text[:n-len("\r\n")]
}

// skip reads a reply of any kind.
func (r *replyReader) skip() {
	switch kind := r.kind(); kind {
	case '$':
		if n := r.number('$'); n >= 0 && r.spend(n) {
			_, err := r.in.Discard(n + len("\r\n"))
			r.fail(err)
		}
	case '*':
		for n := r.number('*'); n > 0 && r.err == nil; n-- {
			r.skip()
		}
	case '+', '-', ':':
		r.line(kind)
	default:
		r.fail(errReplyShape)
	}
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

// dial connects to the server of the first address that answers before ctx ends, beginning with the one at
// index first.
func (t *redisTarget) dial(ctx context.Context, addrs []string, first int) (*redisConn, error) {
	connect := t.dialServer
	if t.primary != "" {
		connect = t.dialPrimary
	}
	var errs []error
	for i := range addrs {
		conn, err := connect(ctx, addrs[(first+i)%len(addrs)])
		if err == nil {
			return conn, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// dialPrimary connects to the primary that a sentinel knows.
func (t *redisTarget) dialPrimary(ctx context.Context, sentinel string) (*redisConn, error) {
	askCtx, cancel := context.WithTimeout(ctx, sentinelTimeout)
	defer cancel()
	server, err := t.askSentinel(askCtx, sentinel, "")
	if isRefusal(err, "NOAUTH") && t.password != "" {
		server, err = t.askSentinel(askCtx, sentinel, t.password)
	}
	if err != nil {
		return nil, fmt.Errorf("sentinel %w", err)
	}
	conn, err := t.dialServer(ctx, server)
	if err != nil {
		return nil, fmt.Errorf("sentinel %s: %w", sentinel, err)
	}
	return conn, nil
}

// dialServer connects to a server, logs in, selects the database and has it answer an ECHO. Behind sentinels
// it asks for the ROLE too: one that has not yet heard of a failover names the old primary.
func (t *redisTarget) dialServer(ctx context.Context, addr string) (*redisConn, error) {
	return t.connect(ctx, addr, func(conn *redisConn) {
		if t.user != "" {
			conn.ask(isOK, "AUTH", t.user, t.password)
		} else if t.password != "" {
			conn.ask(isOK, "AUTH", t.password)
		}
		if t.database != 0 {
			conn.ask(isOK, "SELECT", t.database)
		}
		if t.primary != "" {
			conn.ask(isPrimary, "ROLE")
		}
		conn.ask(func(r *replyReader) {
			if echo := string(r.bulk()); echo != conn.nonce && r.ok() {
				r.fail(errOutOfStep)
			}
		}, "ECHO", conn.nonce)
	})
}

func isOK(r *replyReader) { r.status("OK") }

// isPrimary reads ROLE's answer: an array that begins with the role.
func isPrimary(r *replyReader) {
	n := r.number('*')
	if n < 1 {
		r.fail(errReplyShape)
		return
	}
	if string(r.bulk()) != "master" {
		r.fail(errNoPrimary)
	}
	for ; n > 1 && r.err == nil; n-- {
		r.skip()
	}
}

// askSentinel returns the address of the primary. Without a password the sentinel gets none.
func (t *redisTarget) askSentinel(ctx context.Context, sentinel, password string) (addr string, err error) {
	conn, err := t.connect(ctx, sentinel, func(conn *redisConn) {
		if password != "" {
			conn.ask(isOK, "AUTH", password)
		}
		conn.ask(func(r *replyReader) {
			switch r.number('*') {
			case -1:
				r.fail(fmt.Errorf("knows no primary %q", t.primary))
			case 2:
				host := string(r.bulk())
				port := string(r.bulk())
				addr = net.JoinHostPort(host, port)
			default:
				r.fail(errReplyShape)
			}
		}, "SENTINEL", "get-master-addr-by-name", t.primary)
	})
	if err != nil {
		return "", err
	}
	closeNow(conn.socket)
	return addr, nil
}

// connect opens a connection and has greet talk to the server, until ctx ends.
func (t *redisTarget) connect(
	ctx context.Context, addr string, greet func(*redisConn),
) (*redisConn, error) {
	dial := new(net.Dialer).DialContext
	if t.scheme == "rediss" {
		dial = new(tls.Dialer).DialContext
	}
	socket, err := dial(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", addr, err)
	}
	past := time.Unix(1, 0)
	stop := context.AfterFunc(ctx, func() { socket.SetDeadline(past) })
	conn := newRedisConn(addr, socket)
	conn.user = t.user
	greet(conn)
	if !stop() {
		conn.replies.fail(ctx.Err())
	}
	if err := conn.replies.err; err != nil {
		closeNow(socket)
		return nil, fmt.Errorf("%s: %w", addr, err)
	}
	return conn, nil
}
