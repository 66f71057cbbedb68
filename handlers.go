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
	crossOrigin http.CrossOriginProtection
	draining    atomic.Bool  // the service is about to stop: each answer closes its connection
	outageAt    atomic.Int64 // Unix second of the last log line about a store out of reach
}

// handler returns the status and the JSON of an answer, or an error, which becomes a problem.
type handler func(w http.ResponseWriter, r *http.Request) (status int, body any, err error)

func newServer(cfg config, db *database, sessions SessionStore, gate *gate, metrics *expvar.Map, log *slog.Logger) *server {
	s := &server{cfg: cfg, db: db, sessions: sessions, gate: gate, throttle: throttle{emptyAt: map[string]time.Duration{}}, metrics: metrics, log: log}
	for pattern, handle := range map[string]handler{
		"GET /user": s.showUser, "POST /user": s.register, "/user": only("GET, HEAD, POST"),
		"POST /user/signin": s.signIn, "/user/signin": only("POST"),
		"DELETE /user/session": s.signOut, "/user/session": only("DELETE"),
		"GET /healthz": s.health, "/healthz": only("GET, HEAD"),
		"/": func(http.ResponseWriter, *http.Request) (int, any, error) { return 0, nil, errNotFound },
	} {
		s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			status, body, err := handle(w, r)
			s.answer(w, r, status, body, err)
		})
	}
	metrics.Set("bcryptBusy", expvar.Func(func() any { return len(gate.slots) }))
	metrics.Set("bcryptWaiting", expvar.Func(func() any { return len(gate.queue) }))
	return s
}

// only refuses the methods that a path does not have.
func only(methods string) handler {
	return func(w http.ResponseWriter, r *http.Request) (int, any, error) {
		w.Header().Set("Allow", methods)
		return 0, nil, newProblem(http.StatusMethodNotAllowed, "This path takes only "+methods+".")
	}
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer func() {
		if p := recover(); p != nil {
			s.answer(w, r, 0, nil, fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
		}
	}()
	if s.crossOrigin.Check(r) != nil {
		s.answer(w, r, 0, nil, errCrossOrigin)
	} else if path.Clean("/"+r.URL.Path) != r.URL.Path { // "*" and "" too: the mux would answer by itself
		s.answer(w, r, 0, nil, errNotFound)
	} else {
		s.mux.ServeHTTP(w, r)
	}
}

// answer is the one place that writes, and gives every answer what all have in common.
func (s *server) answer(w http.ResponseWriter, r *http.Request, status int, body any, err error) {
	header, contentType := w.Header(), "application/json"
	header.Set("Cache-Control", "no-store")
	header.Set("X-Content-Type-Options", "nosniff")
	if s.draining.Load() {
		header.Set("Connection", "close")
	}
	if err != nil {
		p := s.problemOf(r, err)
		if p.retryAfter > 0 {
			header.Set("Retry-After", strconv.Itoa(1+int(p.retryAfter/time.Second)))
		}
		header.Del("Set-Cookie")
		status, body, contentType = p.Status, p, "application/problem+json"
	}
	s.metrics.Add(cmp.Or(r.Pattern, "/")+" "+strconv.Itoa(status), 1)
	var text []byte
	if body != nil {
		header.Set("Content-Type", contentType)
		text, _ = json.Marshal(body) // structs and maps of strings: nothing that could fail
	}
	w.WriteHeader(status)
	w.Write(text)
}

type registration struct {
	User      User   `json:"user"`
	SessionID string `json:"sessionId"`
}

// register makes an account and its first session. That spans two stores, without half states: the
// session comes first, and is deleted when the account cannot follow. Until then nobody knows its id.
func (s *server) register(w http.ResponseWriter, r *http.Request) (int, any, error) {
	form, err := readForm(w, r, true, "name", "email", "password")
	if err != nil {
		return 0, nil, err
	}
	now := time.Now().UTC().Format(timeFormat)
	user := User{newUUID(), form["name"], form["email"], now, now}
	// Only a short cut, which spares a bcrypt: the table's UNIQUE decides.
	if _, _, err := s.db.UserByEmail(r.Context(), user.Email); !errors.Is(err, errUserNotFound) {
		return 0, nil, cmp.Or(err, error(errEmailTaken))
	}
	passwordHash, err := s.hashPassword(r.Context(), form["password"])
	if err != nil {
		return 0, nil, err
	}
	id, err := s.openSession(w, r, user)
	if err != nil {
		return 0, nil, err
	}
	if err := s.db.InsertUser(r.Context(), user, passwordHash); err != nil {
		s.sessions.Delete(context.WithoutCancel(r.Context()), id)
		return 0, nil, err
	}
	s.note("registered", user.ID, s.clientAddr(r))
	return http.StatusCreated, registration{user, id}, nil
}

func (s *server) hashPassword(ctx context.Context, password string) (string, error) {
	if err := s.gate.enter(ctx); err != nil {
		return "", err
	}
	defer s.gate.leave(time.Now())
	hash, err := bcrypt.GenerateFromPassword([]byte(password), s.cfg.bcryptCost)
	return string(hash), err
}

// openSession makes a session in place of the one that the request's cookie names.
func (s *server) openSession(w http.ResponseWriter, r *http.Request, user User) (id string, err error) {
	id = newUUID()
	s.setSessionCookie(w, id)
	return id, s.sessions.Create(r.Context(), id, sessionID(r), user, s.cfg.sessionTTL)
}

// signIn takes any text for a password or an email: what could not be registered is simply wrong.
func (s *server) signIn(w http.ResponseWriter, r *http.Request) (int, any, error) {
	form, err := readForm(w, r, false, "email", "password")
	if err != nil {
		return 0, nil, err
	}
	user, err := s.authenticate(r.Context(), form["email"], form["password"], s.clientAddr(r))
	if err != nil {
		return 0, nil, err
	}
	if _, err := s.openSession(w, r, user); err != nil {
		return 0, nil, err
	}
	s.note("signed in", user.ID, s.clientAddr(r))
	return http.StatusOK, user, nil
}

func (s *server) showUser(w http.ResponseWriter, r *http.Request) (int, any, error) {
	id := sessionID(r)
	if id == "" {
		return 0, nil, errNoSession
	}
	s.metrics.Add("sessionLookups", 1)
	s.gate.readAt.Store(time.Now().UnixMilli())
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
	if err := s.throttle.add(email, client, 0); err != nil { // before it queues
		return User{}, err
	}
	user, passwordHash, err := s.db.UserByEmail(ctx, email)
	if err != nil && !errors.Is(err, errUserNotFound) {
		return User{}, err
	}
	if err := s.gate.enter(ctx); err != nil {
		return User{}, err
	}
	defer s.gate.leave(time.Now())
	// Counted now and not after the failure, so that guesses sent at once are counted as well.
	if err := s.throttle.add(email, client, 1); err != nil {
		return User{}, err
	}
	matches, cost, err := s.passwordMatches(passwordHash, password)
	if err != nil {
		return User{}, fmt.Errorf("comparing with the password hash of user %s: %w", user.ID, err)
	}
	if !matches {
		s.note("sign-in refused", user.ID, client)
		return User{}, errWrongPassword
	}
	s.throttle.add(email, client, -1)
	if cost < s.cfg.bcryptCost { // failing to store it anew is no reason to refuse the sign-in
		upgraded, err := bcrypt.GenerateFromPassword([]byte(password), s.cfg.bcryptCost)
		if err = cmp.Or(err, s.db.ReplacePasswordHash(ctx, user.ID, passwordHash, string(upgraded))); err != nil {
			s.log.Warn("password hash not upgraded", "user", user.ID, "err", err)
		}
	}
	return user, nil
}

// passwordMatches spends 2^cost rounds of bcrypt on every failure, whether the account is unknown (its
// hash is empty), its hash is as strong as configured, or weaker: then comparisons at each cost from the
// hash's on make up the sum. No password is known for a dummy, which has the form of a hash only.
func (s *server) passwordMatches(hash, password string) (matches bool, cost int, err error) {
	dummy := func(cost int) string { return fmt.Sprintf("$2a$%02d$%s", cost, strings.Repeat("u", 53)) }
	hash = cmp.Or(hash, dummy(s.cfg.bcryptCost))
	if cost, err = bcrypt.Cost([]byte(hash)); err != nil {
		return false, 0, err
	}
	s.metrics.Add("bcryptRounds", 1<<cost)
	if bcrypt.CompareHashAndPassword([]byte(hash), []byte(password)) == nil {
		_, complaint := normalize("password", password) // bcrypt accepts what only begins with the password
		return complaint == "", cost, nil
	}
	for c := cost; c < s.cfg.bcryptCost; c++ {
		s.metrics.Add("bcryptRounds", 1<<c)
		bcrypt.CompareHashAndPassword([]byte(dummy(c)), []byte(password))
	}
	return false, cost, nil
}

// clientAddr is the peer's address, or what trusted proxies say of it: X-Forwarded-For is read from the
// right, where each proxy adds its peer, as long as the address so far is a trusted proxy's.
func (s *server) clientAddr(r *http.Request) netip.Addr {
	peer, _ := netip.ParseAddrPort(r.RemoteAddr)
	addr := peer.Addr().Unmap().WithZone("")
	trusted := func(proxies netip.Prefix) bool { return proxies.Contains(addr) }
	for _, hop := range slices.Backward(strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")) {
		next, err := netip.ParseAddr(strings.TrimSpace(hop))
		if err != nil || !slices.ContainsFunc(s.cfg.trustedProxies, trusted) {
			break
		}
		addr = next.Unmap().WithZone("")
	}
	return addr
}

const maxBody = 16 << 10 // bytes

// readForm reads the request's body, one JSON object of at most maxBody, and returns the strings in the
// named fields as normalize leaves them; strict: if it finds nothing wrong. Keys are told apart by case, as
// the original did, which decoding into a struct would not.
func readForm(w http.ResponseWriter, r *http.Request, strict bool, names ...string) (map[string]string, error) {
	mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || mediaType != "application/json" {
		return nil, newProblem(http.StatusUnsupportedMediaType, "Send the body as JSON, with Content-Type: application/json.")
	}
	http.NewResponseController(w).SetReadDeadline(time.Now().Add(10 * time.Second)) // until the body's end
	text, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if _, tooLarge := errors.AsType[*http.MaxBytesError](err); tooLarge {
		return nil, newProblem(http.StatusRequestEntityTooLarge, fmt.Sprintf("The body is larger than %d bytes.", maxBody))
	} else if err != nil {
		return nil, newProblem(http.StatusBadRequest, "The body did not arrive whole and in time.")
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(text, &fields); err != nil || fields == nil || !utf8.Valid(text) {
		return nil, newProblem(http.StatusBadRequest, `The body is not one JSON object in UTF-8, such as {"email":"…","password":"…"}.`)
	}
	form, wrong := map[string]string{}, map[string]string{}
	for _, name := range names {
		var text *string
		if json.Unmarshal(fields[name], &text) != nil || text == nil {
			wrong[name] = "is required, as a string"
		} else if value, complaint := normalize(name, *text); strict && complaint != "" {
			wrong[name] = complaint
		} else {
			form[name] = value
		}
	}
	if len(wrong) > 0 {
		return nil, &problem{"Bad Request", http.StatusBadRequest, "Some fields cannot be accepted: see errors.", wrong, 0}
	}
	return form, nil
}

// normalize brings the text of a field into its form and says what is wrong with it.
func normalize(field, text string) (value, complaint string) {
	switch field {
	case "name":
		text = strings.TrimSpace(text)
		if n := utf8.RuneCountInString(text); n < 1 || n > 100 || strings.ContainsFunc(text, unicode.IsControl) {
			complaint = "must have 1 to 100 characters, without control characters"
		}
	case "email": // RFC 5322's addr-spec without comments, quotes or white space, in the 254 bytes of RFC 5321
		text = strings.ToLower(strings.TrimSpace(text))
		parsed, err := mail.ParseAddress(text)
		if err != nil || parsed.Address != text || len(text) > 254 || strings.ContainsFunc(text, unicode.IsControl) {
			complaint = "must be an email address of at most 254 bytes, such as ada@example.com"
		}
	case "password": // bcrypt reads no more than 72 bytes; "a" and "a\x00a" are the same to it
		if n := len(text); n < 8 || n > 72 || strings.Contains(text, "\x00") {
			complaint = "must have 8 to 72 bytes, without NUL"
		}
	}
	return text, complaint
}

// problem is an error that the client is told, RFC 9457.
type problem struct {
	Title      string            `json:"title"`
	Status     int               `json:"status"`
	Detail     string            `json:"detail"`
	Errors     map[string]string `json:"errors,omitempty"`
	retryAfter time.Duration     // 0: no Retry-After
}

func (p *problem) Error() string { return p.Detail }

func newProblem(status int, detail string) *problem {
	return &problem{http.StatusText(status), status, detail, nil, 0}
}

var (
	errNoSession     = newProblem(http.StatusUnauthorized, "There is no session. Sign in.")
	errWrongPassword = newProblem(http.StatusUnauthorized, "The email or the password is wrong.")
	errCrossOrigin   = newProblem(http.StatusForbidden, "A browser sent this from another site. Send it from the service's own origin.")
	errNotFound      = newProblem(http.StatusNotFound, "There is nothing at this path.")
	errEmailTaken    = newProblem(http.StatusConflict, "This email is registered already. Sign in, or use another one.")
	errTooBusy       = &problem{"Service Unavailable", 503, "Too many people are signing in. Try again.", nil, 9 * time.Second}
	errOutOfReach    = &problem{"Service Unavailable", 503, "The service cannot reach its data. Try again.", nil, time.Second}
	errFault         = newProblem(http.StatusInternalServerError, "The service failed. The fault is logged.")
)

// problemOf is the one place where an error becomes a status. It logs what is the service's trouble, of
// which the client is told nothing: at most one line a second about a store, as every request fails while
// it is out of reach.
func (s *server) problemOf(r *http.Request, err error) *problem {
	if p, ok := errors.AsType[*problem](err); ok {
		if p.Status == http.StatusTooManyRequests {
			s.note("sign-in throttled", "", s.clientAddr(r))
		}
		return p
	}
	if !errors.Is(err, errUnavailable) && !errors.Is(err, context.Canceled) {
		s.log.Error("request failed", "method", r.Method, "path", r.URL.Path, "err", err)
		return errFault
	}
	if r.Context().Err() != nil {
		return errOutOfReach // the client has left, that is all
	}
	s.metrics.Add("storeErrors", 1)
	now := time.Now().Unix()
	if last := s.outageAt.Load(); now > last && s.outageAt.CompareAndSwap(last, now) {
		s.log.Error("store out of reach", "err", err)
	}
	return errOutOfReach
}

// A sign-in is answered within 10 s: half of it is for the queue, of so many requests, and half for bcrypt,
// which takes 2 s at the highest cost.
const maxQueue, queuePatience = 256, 5 * time.Second

// gate lets in as many bcrypts at a time as there are cores. Past them requests queue, bounded in number
// and time.
type gate struct {
	slots, queue chan struct{}
	readAt       atomic.Int64 // Unix milliseconds of the last lookup
}

func newGate(cores int) *gate {
	return &gate{slots: make(chan struct{}, cores), queue: make(chan struct{}, maxQueue)}
}

// enter waits for a slot; errTooBusy when none is free in time.
func (g *gate) enter(ctx context.Context) error {
	select {
	case g.queue <- struct{}{}:
		defer func() { <-g.queue }()
	default:
		return errTooBusy
	}
	select {
	case g.slots <- struct{}{}:
		return nil
	case <-time.After(queuePatience):
		return errTooBusy
	case <-ctx.Done():
		return ctx.Err()
	}
}

// leave gives the slot back that was entered then. While sessions are read the slot first rests, two thirds of
// the time that it was held, so that GET keeps more than half of its rate under a storm of sign-ins
// (BenchmarkUserDuringSignIns).
func (g *gate) leave(entered time.Time) {
	rest := time.Since(entered) * 2 / 3
	if time.Now().UnixMilli()-g.readAt.Load() > 10 {
		rest = 0
	}
	time.AfterFunc(rest, func() { <-g.slots })
}

// throttle counts failed sign-ins, by email and client address together and by email alone. Each count is
// a leaky bucket in the form of the generic cell rate algorithm: the time at which it will be empty. Only
// what has had a slot for bcrypt fills one, and each is empty again in some minutes, so the machine's speed
// at bcrypt bounds how many there are.
type throttle struct {
	mu      sync.Mutex
	emptyAt map[string]time.Duration // since 1970, by hashes, as a client may send a long email
	sweepAt int                      // size of the map at which what is empty is thrown out
}

// add counts n tries as failed (0: only looks), or returns the problem that there were too many. A try
// that succeeded takes itself back with n = -1, and all the failures of its pair.
func (t *throttle) add(email string, client netip.Addr, n time.Duration) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Duration(time.Now().UnixNano())
	pair, all := string(hashID(client.String()+" "+email)), string(hashID(email))
	if wait := max(t.emptyAt[pair]-9*time.Minute, t.emptyAt[all]-99*6*time.Second) - now; wait > 0 && n >= 0 {
		return &problem{"Too Many Requests", 429, "Too many failed sign-ins for this account. Wait before the next try.", nil, wait}
	}
	if len(t.emptyAt) >= t.sweepAt {
		maps.DeleteFunc(t.emptyAt, func(_ string, emptyAt time.Duration) bool { return emptyAt <= now })
		t.sweepAt = 2*len(t.emptyAt) + 1000
	}
	t.emptyAt[pair] = max(t.emptyAt[pair], now) + n*time.Minute
	t.emptyAt[all] = max(t.emptyAt[all], now) + n*6*time.Second
	if n < 0 {
		delete(t.emptyAt, pair)
	}
	return nil
}
