// HTTP: the routes and their handlers, JSON and problems, and what keeps sign-ins in bounds: the
// throttle on failures and the gate in front of bcrypt.

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"expvar"
	"fmt"
	"hash/maphash"
	"io"
	"log/slog"
	"maps"
	"mime"
	"net/http"
	"net/mail"
	"net/netip"
	"path"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/crypto/bcrypt"
)

// server answers requests.
type server struct {
	cfg         config
	db          *database
	sessions    SessionStore
	gate        *gate
	throttle    throttle
	metrics     *expvar.Map
	log         *slog.Logger
	mux         http.ServeMux
	methods     map[string][]string // of each path
	crossOrigin http.CrossOriginProtection
	draining    atomic.Bool  // the service is about to stop: each answer closes its connection
	outageAt    atomic.Int64 // Unix second of the last log line about a store out of reach
}

// handler returns the status and the JSON of an answer, or an error, which becomes a problem.
type handler func(w http.ResponseWriter, r *http.Request) (status int, body any, err error)

func newServer(cfg config, db *database, sessions SessionStore, gate *gate, metrics *expvar.Map, log *slog.Logger) *server {
	s := &server{cfg: cfg, db: db, sessions: sessions, gate: gate, metrics: metrics, log: log,
		throttle: throttle{seed: maphash.MakeSeed(), emptyAt: map[uint64]time.Time{}}, methods: map[string][]string{}}
	for _, route := range []struct {
		method, path string
		handle       handler
	}{
		{"GET", "/user", s.showUser},
		{"POST", "/user", s.register},
		{"POST", "/user/signin", s.signIn},
		{"DELETE", "/user/session", s.signOut},
		{"GET", "/healthz", s.health},
	} {
		s.mux.HandleFunc(route.method+" "+route.path, func(w http.ResponseWriter, r *http.Request) { s.answer(w, r, route.handle) })
		s.methods[route.path] = append(s.methods[route.path], strings.Replace(route.method, "GET", "GET, HEAD", 1))
	}
	s.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { s.answer(w, r, s.refuseRoute) })
	metrics.Set("bcryptBusy", expvar.Func(func() any { return len(gate.slots) + len(gate.spare) }))
	metrics.Set("bcryptWaiting", expvar.Func(func() any { return len(gate.queue) }))
	return s
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if path.Clean("/"+r.URL.Path) == r.URL.Path {
		s.mux.ServeHTTP(w, r)
	} else { // "*" and "" too: the mux would answer by itself, without our headers
		s.answer(w, r, s.refuseRoute)
	}
}

// answer is the one place that writes, and gives every answer what all have in common.
func (s *server) answer(w http.ResponseWriter, r *http.Request, handle handler) {
	header := w.Header()
	header.Set("Cache-Control", "no-store")
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Content-Type", "application/json")
	status, body, err := s.call(handle, w, r)
	if s.draining.Load() {
		header.Set("Connection", "close")
	}
	if err != nil {
		p := s.problemOf(r, err)
		if p.retryAfter > 0 {
			header.Set("Retry-After", strconv.Itoa(int((p.retryAfter+time.Second-1)/time.Second)))
		}
		header.Set("Content-Type", "application/problem+json")
		status, body = p.Status, p
	}
	s.metrics.Add(r.Pattern+" "+strconv.Itoa(status), 1)
	if body == nil {
		header.Del("Content-Type")
		w.WriteHeader(status)
		return
	}
	text, _ := json.Marshal(body) // structs and maps of strings: nothing that could fail
	w.WriteHeader(status)
	w.Write(text)
}

// call runs a handler, unless a browser sent the request from another origin. A panic is an error.
func (s *server) call(handle handler, w http.ResponseWriter, r *http.Request) (status int, body any, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	if s.crossOrigin.Check(r) != nil {
		return 0, nil, newProblem(http.StatusForbidden, "A browser sent this from another site. Send it from the service's own origin.")
	}
	return handle(w, r)
}

// refuseRoute answers what no other route takes.
func (s *server) refuseRoute(w http.ResponseWriter, r *http.Request) (int, any, error) {
	methods, ok := s.methods[r.URL.Path]
	if !ok {
		return 0, nil, newProblem(http.StatusNotFound, "There is nothing at this path.")
	}
	w.Header().Set("Allow", strings.Join(methods, ", "))
	return 0, nil, newProblem(http.StatusMethodNotAllowed, "This path takes only "+strings.Join(methods, ", ")+".")
}

type registration struct {
	User      User   `json:"user"`
	SessionID string `json:"sessionId"`
}

// register makes an account and its first session. That spans two stores, without half states: the
// session comes first, and is deleted when the account cannot follow. Until then nobody knows its id.
func (s *server) register(w http.ResponseWriter, r *http.Request) (int, any, error) {
	form, err := readForm(w, r, map[string]check{"name": checkName, "email": checkEmail, "password": checkPassword})
	if err != nil {
		return 0, nil, err
	}
	now := time.Now().UTC().Format(timeFormat)
	user := User{newUUID(), form["name"], form["email"], now, now}
	// Only a short cut, which spares a bcrypt: the table's UNIQUE decides.
	if _, _, err := s.db.UserByEmail(r.Context(), user.Email); !errors.Is(err, errUserNotFound) {
		return 0, nil, cmp.Or(err, errEmailTaken)
	}
	passwordHash, err := s.hashPassword(r.Context(), form["password"])
	if err != nil {
		return 0, nil, err
	}
	id := newUUID()
	if err := s.sessions.Create(r.Context(), id, sessionID(r), user, s.cfg.sessionTTL); err != nil {
		return 0, nil, err
	}
	if err := s.db.InsertUser(r.Context(), user, passwordHash); err != nil {
		s.sessions.Delete(context.WithoutCancel(r.Context()), id) // if this fails too, it expires unknown to anyone
		return 0, nil, err
	}
	s.note("registered", user.ID, s.clientAddr(r))
	s.setSessionCookie(w, id)
	return http.StatusCreated, registration{user, id}, nil
}

// signIn makes a new session, always (a session fixed by an attacker is no use to him), and deletes the
// one that the request's cookie names.
func (s *server) signIn(w http.ResponseWriter, r *http.Request) (int, any, error) {
	form, err := readForm(w, r, map[string]check{"email": normalizeEmail, "password": asItIs})
	if err != nil {
		return 0, nil, err
	}
	user, err := s.authenticate(r.Context(), form["email"], form["password"], s.clientAddr(r))
	if err != nil {
		return 0, nil, err
	}
	id := newUUID()
	if err := s.sessions.Create(r.Context(), id, sessionID(r), user, s.cfg.sessionTTL); err != nil {
		return 0, nil, err
	}
	s.note("signed in", user.ID, s.clientAddr(r))
	s.setSessionCookie(w, id)
	return http.StatusOK, user, nil
}

func (s *server) showUser(w http.ResponseWriter, r *http.Request) (int, any, error) {
	id := sessionID(r)
	if id == "" {
		return 0, nil, errNoSession
	}
	s.metrics.Add("sessionLookups", 1)
	s.gate.readAt.Store(time.Now().UnixNano())
	user, err := s.sessions.Get(r.Context(), id)
	return http.StatusOK, user, err
}

// signOut cannot fail because it was done before.
func (s *server) signOut(w http.ResponseWriter, r *http.Request) (int, any, error) {
	if id := sessionID(r); id != "" {
		if err := s.sessions.Delete(r.Context(), id); err != nil {
			return 0, nil, err
		}
		s.note("signed out", "", s.clientAddr(r))
	}
	s.setSessionCookie(w, "")
	return http.StatusNoContent, nil, nil
}

func (s *server) health(w http.ResponseWriter, r *http.Request) (int, any, error) {
	ctx, cancel := context.WithTimeout(r.Context(), writeTimeout)
	defer cancel()
	return http.StatusOK, map[string]string{"status": "ok"}, cmp.Or(s.db.Ping(ctx), s.sessions.Ping(ctx))
}

// note logs and counts an event of authentication.
func (s *server) note(event, userID string, client netip.Addr) {
	s.metrics.Add(event, 1)
	s.log.Info(event, "user", userID, "client", client)
}

// authenticate returns the user with that email if the password is right. An unknown email and a wrong
// password cost the same bcrypt rounds, so that time does not tell which it was.
func (s *server) authenticate(ctx context.Context, email, password string, client netip.Addr) (User, error) {
	if err := s.countFailures(email, client, 0); err != nil { // before it queues
		return User{}, err
	}
	user, passwordHash, err := s.db.UserByEmail(ctx, email)
	if err != nil && !errors.Is(err, errUserNotFound) {
		return User{}, err
	}
	leave, err := s.gate.enter(ctx)
	if err != nil {
		return User{}, err
	}
	defer leave()
	// Counted now and not after the failure, so that guesses sent at once are counted as well.
	if err := s.countFailures(email, client, 1); err != nil {
		return User{}, err
	}
	matches, err := s.passwordMatches(passwordHash, password)
	if err != nil {
		return User{}, fmt.Errorf("comparing with the password hash of user %s: %w", user.ID, err)
	}
	if !matches {
		s.note("sign-in refused", user.ID, client)
		return User{}, newProblem(http.StatusUnauthorized, "The email or the password is wrong.")
	}
	s.countFailures(email, client, -1)
	// A hash below the configured cost is stored anew. Failing that is no reason to refuse the sign-in.
	if cost, err := bcrypt.Cost([]byte(passwordHash)); err == nil && cost < s.cfg.bcryptCost {
		upgraded, err := bcrypt.GenerateFromPassword([]byte(password), s.cfg.bcryptCost)
		if err = cmp.Or(err, s.db.ReplacePasswordHash(ctx, user.ID, passwordHash, string(upgraded))); err != nil {
			s.log.Warn("password hash not upgraded", "user", user.ID, "err", err)
		}
	}
	return user, nil
}

// countFailures is throttle.add with its refusal as a problem.
func (s *server) countFailures(email string, client netip.Addr, n int) error {
	wait := s.throttle.add(email, client, n)
	if wait == 0 {
		return nil
	}
	s.note("sign-in throttled", "", client)
	p := newProblem(http.StatusTooManyRequests, "Too many failed sign-ins for this account. Wait before the next try.")
	p.retryAfter = wait
	return p
}

// passwordMatches spends 2^cost rounds of bcrypt on every failure, whether the account is unknown (its
// hash is empty), its hash is as strong as configured, or weaker: then comparisons at each cost from the
// hash's on make up the sum.
func (s *server) passwordMatches(passwordHash, password string) (bool, error) {
	possible := passwordHash != "" && checkPassword(&password) == ""
	passwordHash = cmp.Or(passwordHash, dummyHash(s.cfg.bcryptCost))
	err := s.compare(passwordHash, password)
	if err != nil && !errors.Is(err, bcrypt.ErrMismatchedHashAndPassword) {
		return false, err
	}
	if possible && err == nil {
		return true, nil
	}
	cost, err := bcrypt.Cost([]byte(passwordHash))
	for ; err == nil && cost < s.cfg.bcryptCost; cost++ {
		s.compare(dummyHash(cost), password)
	}
	return false, err
}

// dummyHash has the form of a bcrypt hash, so that comparing with it costs the same; nobody knows a
// password for it, and nobody computed it at the start.
func dummyHash(cost int) string { return fmt.Sprintf("$2a$%02d$%s", cost, strings.Repeat("u", 53)) }

func (s *server) compare(passwordHash, password string) error {
	cost, _ := bcrypt.Cost([]byte(passwordHash))
	s.metrics.Add("bcryptRounds", 1<<cost)
	return bcrypt.CompareHashAndPassword([]byte(passwordHash), []byte(password))
}

func (s *server) hashPassword(ctx context.Context, password string) (string, error) {
	leave, err := s.gate.enter(ctx)
	if err != nil {
		return "", err
	}
	defer leave()
	hash, err := bcrypt.GenerateFromPassword([]byte(password), s.cfg.bcryptCost)
	return string(hash), err
}

// clientAddr is the peer's address, or what trusted proxies say of it: X-Forwarded-For is read from the
// right, where each proxy adds its peer, as long as the address so far is a trusted proxy's.
func (s *server) clientAddr(r *http.Request) netip.Addr {
	peer, _ := netip.ParseAddrPort(r.RemoteAddr)
	addr := peer.Addr().Unmap().WithZone("")
	trusted := func(prefix netip.Prefix) bool { return prefix.Contains(addr) }
	hops := strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")
	for i := len(hops) - 1; i >= 0 && slices.ContainsFunc(s.cfg.trustedProxies, trusted); i-- {
		hop, err := netip.ParseAddr(strings.TrimSpace(hops[i]))
		if err != nil {
			break
		}
		addr = hop.Unmap().WithZone("")
	}
	return addr
}

const maxBody = 16 << 10 // bytes

// check brings the string of a field into its form, or returns what is wrong with it.
type check func(text *string) (complaint string)

// readForm reads the request's body, one JSON object of at most maxBody, and returns the strings in the
// fields that checks name. Its keys are told apart by case, as the original did, which decoding into a
// struct would not.
func readForm(w http.ResponseWriter, r *http.Request, checks map[string]check) (map[string]string, error) {
	mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || mediaType != "application/json" {
		return nil, newProblem(http.StatusUnsupportedMediaType, "Send the body as JSON, with Content-Type: application/json.")
	}
	control := http.NewResponseController(w)
	control.SetReadDeadline(time.Now().Add(bodyTimeout))
	text, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if tooLarge := new(http.MaxBytesError); errors.As(err, &tooLarge) {
		return nil, newProblem(http.StatusRequestEntityTooLarge, fmt.Sprintf("The body is larger than %d bytes.", maxBody))
	} else if err != nil {
		w.Header().Set("Connection", "close")
		return nil, newProblem(http.StatusBadRequest, "The body did not arrive whole and in time.")
	}
	control.SetReadDeadline(time.Time{}) // or the request's context would end with it, in the queue for bcrypt
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(text, &fields); err != nil || fields == nil || !utf8.Valid(text) {
		return nil, newProblem(http.StatusBadRequest, `The body is not one JSON object in UTF-8, such as {"email":"…","password":"…"}.`)
	}
	form, p := map[string]string{}, newProblem(http.StatusBadRequest, "Some fields cannot be accepted: see errors.")
	p.Errors = map[string]string{}
	for field, check := range checks {
		var value *string
		if raw := fields[field]; raw != nil && json.Unmarshal(raw, &value) != nil {
			p.Errors[field] = "must be a string"
		} else if value == nil {
			p.Errors[field] = "is required"
		} else if complaint := check(value); complaint != "" {
			p.Errors[field] = complaint
		} else {
			form[field] = *value
		}
	}
	if len(p.Errors) > 0 {
		return nil, p
	}
	return form, nil
}

func asItIs(*string) string { return "" }

func checkName(name *string) string {
	*name = strings.TrimSpace(*name)
	if n := utf8.RuneCountInString(*name); n < 1 || n > 100 || strings.ContainsFunc(*name, unicode.IsControl) {
		return "must have 1 to 100 characters, without control characters"
	}
	return ""
}

func normalizeEmail(email *string) string {
	*email = strings.ToLower(strings.TrimSpace(*email))
	return ""
}

// checkEmail accepts a bare address: RFC 5322's addr-spec without comments, quotes or white space, in the
// 254 bytes of RFC 5321.
func checkEmail(email *string) string {
	normalizeEmail(email)
	parsed, err := mail.ParseAddress(*email)
	if err != nil || parsed.Address != *email || len(*email) > 254 || strings.ContainsFunc(*email, unicode.IsControl) {
		return "must be an email address of at most 254 bytes, such as ada@example.com"
	}
	return ""
}

// checkPassword keeps to what bcrypt tells apart: it reads no more than 72 bytes, ends the password with
// NUL and repeats it, so that "a" and "a\x00a" are the same to it.
func checkPassword(password *string) string {
	if n := len(*password); n < 8 || n > 72 || strings.Contains(*password, "\x00") {
		return "must have 8 to 72 bytes, without NUL"
	}
	return ""
}

// problem is an answer of 400 or above, RFC 9457.
type problem struct {
	Title  string            `json:"title"`
	Status int               `json:"status"`
	Detail string            `json:"detail"`
	Errors map[string]string `json:"errors,omitempty"`

	retryAfter time.Duration // 0: no Retry-After
}

func (p *problem) Error() string { return p.Detail }

func newProblem(status int, detail string) *problem {
	return &problem{Title: http.StatusText(status), Status: status, Detail: detail}
}

// problemOf is the one place where an error becomes a status. It logs what is the service's trouble, of
// which the client is told nothing: at most one line a second about a store, as every request fails while
// it is out of reach.
func (s *server) problemOf(r *http.Request, err error) (p *problem) {
	switch {
	case errors.As(err, &p):
	case errors.Is(err, errNoSession):
		p = newProblem(http.StatusUnauthorized, "There is no session. Sign in.")
	case errors.Is(err, errEmailTaken):
		p = newProblem(http.StatusConflict, "This email is registered already. Sign in, or use another one.")
	case errors.Is(err, errTooBusy):
		p = newProblem(http.StatusServiceUnavailable, "Too many people are signing in. Try again.")
		p.retryAfter = 10 * time.Second
	case errors.Is(err, errUnavailable), errors.Is(err, context.Canceled):
		p = newProblem(http.StatusServiceUnavailable, "The service cannot reach its data. Try again.")
		p.retryAfter = 2 * time.Second
		if r.Context().Err() != nil {
			break // the client has left, that is all
		}
		s.metrics.Add("storeErrors", 1)
		now := time.Now().Unix()
		if last := s.outageAt.Load(); now > last && s.outageAt.CompareAndSwap(last, now) {
			s.log.Error("store out of reach", "err", err)
		}
	default:
		p = newProblem(http.StatusInternalServerError, "The service failed. The fault is logged.")
		s.log.Error("request failed", "method", r.Method, "path", r.URL.Path, "err", err)
	}
	return p
}

var errTooBusy = errors.New("too many wait for bcrypt")

// A sign-in is answered within 10 s: half of it is for the queue, and half for bcrypt, which takes 2 s
// at the highest cost.
const (
	maxQueue      = 256 // requests
	queuePatience = 5 * time.Second
	readGap       = 10 * time.Millisecond // since the last lookup: few are read
	recheck       = 50 * time.Millisecond
)

// gate lets in as many bcrypts at a time as there are cores, and one less while hundreds of sessions a
// second are read, which would otherwise have to wait for a core: GET then keeps more than half of its
// rate under a storm of sign-ins (BenchmarkUserDuringSignIns). Past them requests queue, bounded in number
// and time.
type gate struct {
	slots, spare, queue chan struct{}
	readAt              atomic.Int64 // Unix nanoseconds of the last lookup
}

func newGate(cores int) *gate {
	slots := max(1, cores-1)
	return &gate{slots: make(chan struct{}, slots), spare: make(chan struct{}, cores-slots), queue: make(chan struct{}, maxQueue)}
}

// enter takes a slot and returns what gives it back; errTooBusy when none is free in time.
func (g *gate) enter(ctx context.Context) (leave func(), err error) {
	select {
	case g.queue <- struct{}{}:
		defer func() { <-g.queue }()
	default:
		return nil, errTooBusy
	}
	ctx, cancel := context.WithTimeoutCause(ctx, queuePatience, errTooBusy)
	defer cancel()
	for {
		spare := g.spare
		if time.Now().UnixNano()-g.readAt.Load() < int64(readGap) {
			spare = nil // takes nobody
		}
		select {
		case g.slots <- struct{}{}:
			return func() { <-g.slots }, nil
		case spare <- struct{}{}:
			return func() { <-g.spare }, nil
		case <-time.After(recheck):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// throttle counts failed sign-ins, by email and client address together and by email alone. Each count is
// a leaky bucket in the form of the generic cell rate algorithm: the time at which it will be empty. Only
// a try that has a slot for bcrypt adds to a count, and each is empty again in some minutes, so the
// machine's speed at bcrypt bounds how many there are.
type throttle struct {
	seed    maphash.Seed
	mu      sync.Mutex
	emptyAt map[uint64]time.Time // by hashes, as a client may send a long email
	sweepAt int                  // size of the map at which what is empty is thrown out
}

// add counts n tries as failed (0: only looks), or returns how long until one may be made. A try that
// succeeded takes itself back with n = -1, and all the failures of its pair.
func (t *throttle) add(email string, client netip.Addr, n int) (wait time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	pair, all := maphash.String(t.seed, client.String()+" "+email), maphash.String(t.seed, email)
	wait = max(t.emptyAt[pair].Add(-9*time.Minute).Sub(now), t.emptyAt[all].Add(-99*6*time.Second).Sub(now), 0)
	if wait > 0 && n > 0 || n == 0 {
		return wait
	}
	if len(t.emptyAt) >= t.sweepAt {
		maps.DeleteFunc(t.emptyAt, func(_ uint64, emptyAt time.Time) bool { return emptyAt.Before(now) })
		t.sweepAt = 2*len(t.emptyAt) + 1000
	}
	for key, refill := range map[uint64]time.Duration{pair: time.Minute, all: 6 * time.Second} {
		from := t.emptyAt[key]
		if from.Before(now) {
			from = now
		}
		t.emptyAt[key] = from.Add(time.Duration(n) * refill)
	}
	if n < 0 {
		delete(t.emptyAt, pair)
	}
	return 0
}
