// HTTP: the routes and their handlers, cookies, JSON and problems, and the gate, which keeps sign-ins in
// bounds.

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"mime"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
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

// serverConfig holds the server's settings, checked by loadConfig.
type serverConfig struct {
	sessionTTL     time.Duration // whole seconds
	bcryptCost     int
	bcryptSlots    int // how many bcrypts run at a time
	cookieSecure   bool
	trustedProxies []netip.Prefix
	compareHash    func(hash, password []byte) error // bcrypt.CompareHashAndPassword; tests count its calls
}

// A sign-in is answered within 10 s: queueTimeout for the accounts and the queue, the rest for bcrypt,
// which takes 2 s at the highest cost, and for the sessions.
const (
	bodyTimeout  = 10 * time.Second
	queueTimeout = 5 * time.Second
	storeTimeout = 2500 * time.Millisecond // for all that a request wants of the stores, in turn
)

// server answers requests.
type server struct {
	cfg           serverConfig
	accounts      *database
	sessions      SessionStore
	gate          *gate
	log           *slog.Logger
	limited       *limitedLog
	accountHealth *storeHealth
	sessionHealth *storeHealth
	mux           *http.ServeMux
	paths         map[string]bool // that have a route
	crossOrigin   http.CrossOriginProtection
	draining      atomic.Bool    // the service is about to stop: each answer closes its connection
	background    sync.WaitGroup // work that goes on after its answer
	warnOfProxy   sync.Once
	started       time.Time
	inFlight      atomic.Int64             // requests
	answers       map[string]*statusCounts // by route, "" where there is none
	events        serverEvents

	// Values of headers, made once for all answers.
	noStore, noSniff, typeJSON, typeProblem []string
}

// statusCounts counts answers by their status.
type statusCounts [600]atomic.Int64

// serverEvents counts since the start.
type serverEvents struct {
	lookups    atomic.Int64 // sessions that the store was asked for
	registered atomic.Int64
	signedIn   atomic.Int64
	signedOut  atomic.Int64
	refused    atomic.Int64 // sign-ins with a wrong email or password
	throttled  atomic.Int64
	tooBusy    atomic.Int64
}

// handler returns the status and the JSON of an answer, or an error, which becomes a problem.
type handler func(w http.ResponseWriter, r *http.Request) (status int, body any, err error)

func newServer(cfg serverConfig, db *database, sessions SessionStore, log *slog.Logger) *server {
	limited := &limitedLog{lines: map[lineKey]*limitedLine{}}
	s := &server{
		cfg:           cfg,
		accounts:      db,
		sessions:      sessions,
		gate:          newGate(cfg.bcryptSlots),
		log:           log,
		limited:       limited,
		accountHealth: &storeHealth{log: log.With("store", "accounts"), limited: limited},
		sessionHealth: &storeHealth{log: log.With("store", "sessions"), limited: limited},
		mux:           http.NewServeMux(),
		paths:         map[string]bool{},
		started:       time.Now(),
		answers:       map[string]*statusCounts{"": {}},
		noStore:       []string{"no-store"},
		noSniff:       []string{"nosniff"},
		typeJSON:      []string{"application/json"},
		typeProblem:   []string{"application/problem+json"},
	}
	s.route("/user", map[string]handler{"GET": s.showUser, "POST": s.register})
	s.route("/user/signin", map[string]handler{"POST": s.signIn})
	s.route("/user/session", map[string]handler{"DELETE": s.signOut})
	s.route("/healthz", map[string]handler{"GET": s.health})
	return s
}

// route serves a path's methods, and refuses the others.
func (s *server) route(path string, methods map[string]handler) {
	allowed := slices.Collect(maps.Keys(methods))
	if methods["GET"] != nil {
		allowed = append(allowed, "HEAD") // as ServeMux has it
	}
	slices.Sort(allowed)
	allow := strings.Join(allowed, ", ")
	s.paths[path] = true
	for method, handle := range methods {
		s.handle(method+" "+path, handle)
	}
	s.handle(path, func(w http.ResponseWriter, r *http.Request) (int, any, error) {
		w.Header().Set("Allow", allow)
		return 0, nil, newProblem(http.StatusMethodNotAllowed, "This path takes only "+allow+".")
	})
}

func (s *server) handle(pattern string, handle handler) {
	s.answers[pattern] = new(statusCounts)
	s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		status, body, err := handle(w, r)
		s.answer(w, r, status, body, err)
	})
}

// metrics returns by name what was counted since the start (…_total), and what is going on.
func (s *server) metrics() map[string]any {
	running, waiting := s.gate.load()
	return map[string]any{
		"session_lookups_total":      s.events.lookups.Load(),
		"registered_total":           s.events.registered.Load(),
		"signed_in_total":            s.events.signedIn.Load(),
		"signed_out_total":           s.events.signedOut.Load(),
		"sign_ins_refused_total":     s.events.refused.Load(),
		"throttled_total":            s.events.throttled.Load(),
		"too_busy_total":             s.events.tooBusy.Load(),
		"session_store_errors_total": s.sessionHealth.errors.Load(),
		"account_store_errors_total": s.accountHealth.errors.Load(),
		"answers_total":              s.answersByName(),
		"bcrypts_running":            running,
		"sign_ins_waiting":           waiting,
		"requests_in_flight":         s.inFlight.Load(),
		"uptime_seconds":             time.Since(s.started).Seconds(),
		"sessions_away_seconds":      s.sessionHealth.away().Seconds(),
		"accounts_away_seconds":      s.accountHealth.away().Seconds(),
	}
}

// answersByName returns how many answers there were, such as of "GET /user 200", or "404" where there is no
// route.
func (s *server) answersByName() map[string]int64 {
	byName := map[string]int64{}
	for route, statuses := range s.answers {
		for status := range statuses {
			if n := statuses[status].Load(); n > 0 {
				byName[strings.TrimSpace(route+" "+strconv.Itoa(status))] = n
			}
		}
	}
	return byName
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.inFlight.Add(1)
	defer func() {
		if p := recover(); p != nil {
			s.answer(w, r, 0, nil, fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
		}
		s.inFlight.Add(-1)
	}()
	path := canonicalPath(r.URL)
	if s.crossOrigin.Check(r) != nil {
		s.answer(w, r, 0, nil, newProblem(http.StatusForbidden, "A browser sent this from another origin "+
			"(a sister domain or another port is one). Send it from the service's own origin. "+
			"A proxy in front of it must pass on the Host header."))
		return
	}
	if !s.paths[path] { // the mux would redirect some of them
		s.answer(w, r, 0, nil, newProblem(http.StatusNotFound, "There is nothing at this path."))
		return
	}
	if path != r.URL.Path {
		r = r.WithContext(r.Context()) // a copy: the caller's request is not ours to change
		r.URL = &url.URL{Path: path}
	}
	s.mux.ServeHTTP(w, r)
}

// canonicalPath returns the path as routes have it. Paths match as in Express: in any case, with or without
// one slash at the end, and not unescaped.
func canonicalPath(u *url.URL) string {
	return strings.ToLower(strings.TrimSuffix(u.EscapedPath(), "/"))
}

// answer is the one place that writes, and gives every answer what all have in common. The names of headers
// are written as net/http canonicalizes them.
func (s *server) answer(w http.ResponseWriter, r *http.Request, status int, body any, err error) {
	header := w.Header()
	header["Cache-Control"] = s.noStore
	header["X-Content-Type-Options"] = s.noSniff
	// net/http reads what is left of a request's body before it sends the answer, unless the connection is to
	// be closed. Some proxies announce a body with a GET and send none: its answer must not wait.
	hasUnreadBody := r.ContentLength != 0 && r.Method != http.MethodPost
	if hasUnreadBody || s.draining.Load() {
		header["Connection"] = []string{"close"}
	}
	contentType := s.typeJSON
	if err != nil {
		p := s.problemOf(r, err)
		if p.retryAfter > 0 {
			seconds := (p.retryAfter + time.Second - 1) / time.Second
			header["Retry-After"] = []string{strconv.Itoa(int(seconds))}
		}
		status = p.Status
		body = p
		contentType = s.typeProblem
	}
	s.answers[r.Pattern][status].Add(1)
	if body == nil {
		w.WriteHeader(status)
		return
	}
	text, _ := json.Marshal(body) // structs and maps of strings: it cannot fail
	header["Content-Type"] = contentType
	w.WriteHeader(status)
	w.Write(text)
}

// registration is the JSON answer of POST /user.
type registration struct {
	User      User   `json:"user"`
	SessionID string `json:"sessionId"`
}

func (s *server) register(w http.ResponseWriter, r *http.Request) (int, any, error) {
	form, err := readForm(w, r,
		field{"name", checkName},
		field{"email", checkEmail},
		field{"password", checkPassword})
	if err != nil {
		return 0, nil, err
	}
	client := s.clientOf(r)
	passwordHash, err := s.hashPassword(r.Context(), s.gate.newRegistration(client), form["password"])
	if err != nil {
		return 0, nil, err
	}
	ctx, cancel := context.WithTimeout(r.Context(), storeTimeout)
	defer cancel()
	user, id, err := s.createAccount(ctx, form, passwordHash)
	if err != nil {
		return 0, nil, err
	}
	s.gate.remember(accountOf(user), client)
	if old := sessionID(r); old != "" {
		s.deleteSession(ctx, old) // if that fails, the log says so; the account is made
	}
	s.events.registered.Add(1)
	s.log.Info("registered", "user", user.ID, "client", client.addr)
	s.setSessionCookie(w, id)
	return http.StatusCreated, registration{User: user, SessionID: id}, nil
}

// hashPassword waits for a slot and hashes the first 72 bytes of a password. The try counts against its
// limits even if a registration then fails: it has cost a bcrypt.
func (s *server) hashPassword(ctx context.Context, try *try, password string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, queueTimeout, errTooBusy)
	defer cancel()
	if err := try.acquire(ctx); err != nil {
		return "", err
	}
	defer try.release()
	hash, err := bcrypt.GenerateFromPassword([]byte(firstBytes(password)), s.cfg.bcryptCost)
	if err != nil {
		return "", fmt.Errorf("hashing a password: %w", err)
	}
	try.count()
	return string(hash), nil
}

// createAccount makes an account and its first session, and returns the session's id. It spans two stores,
// without half states: the session comes first, and is deleted when the account cannot follow. Nobody knows
// its id before that.
func (s *server) createAccount(
	ctx context.Context, form map[string]string, passwordHash string,
) (user User, id string, err error) {
	now := time.Now().UTC().Format(timeFormat)
	user = User{
		ID:        newUUID(),
		Name:      strings.TrimSpace(form["name"]),
		Email:     strings.TrimSpace(form["email"]),
		CreatedAt: now,
		UpdatedAt: now,
	}
	id = newUUID()
	err = s.sessionHealth.observe(ctx, s.sessions.Create(ctx, id, user, s.cfg.sessionTTL))
	if err != nil {
		return User{}, "", err
	}
	err = s.accountHealth.observe(ctx, s.accounts.InsertUser(ctx, user, form["email"], passwordHash))
	if err != nil {
		s.discardSession(id)
		return User{}, "", err
	}
	return user, id, nil
}

// discardSession deletes a session whose id was not sent. Should that fail, the session expires.
func (s *server) discardSession(id string) {
	s.background.Go(func() { s.deleteSession(context.Background(), id) })
}

func (s *server) deleteSession(ctx context.Context, id string) error {
	return s.sessionHealth.observe(ctx, s.sessions.Delete(ctx, id))
}

func (s *server) signIn(w http.ResponseWriter, r *http.Request) (int, any, error) {
	form, err := readForm(w, r,
		field{"email", checkGivenEmail},
		field{"password", checkGivenPassword})
	if err != nil {
		return 0, nil, err
	}
	client := s.clientOf(r)
	user, passwordHash, err := s.authenticate(r.Context(), form["email"], form["password"], client)
	if err != nil {
		return 0, nil, err
	}
	ctx, cancel := context.WithTimeout(r.Context(), storeTimeout)
	defer cancel()
	id := newUUID()
	err = s.sessionHealth.observe(ctx, s.sessions.Create(ctx, id, user, s.cfg.sessionTTL))
	if err != nil {
		return 0, nil, err
	}
	if old := sessionID(r); old != "" {
		if err := s.deleteSession(ctx, old); err != nil && !errors.Is(err, errNoSession) {
			s.discardSession(id)
			return 0, nil, err
		}
	}
	s.events.signedIn.Add(1)
	s.log.Info("signed in", "user", user.ID, "client", client.addr)
	s.background.Go(func() { s.upgradeHash(user.ID, passwordHash, form["password"]) })
	s.setSessionCookie(w, id)
	return http.StatusOK, user, nil
}

// authenticate returns the user whose email and password these are, and the password's hash.
func (s *server) authenticate(ctx context.Context, email, password string, c client) (User, string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, queueTimeout, errTooBusy)
	defer cancel()
	user, passwordHash, err := s.accounts.UserByEmail(ctx, email)
	s.accountHealth.observe(ctx, err)
	found := err == nil
	if !found && !errors.Is(err, errUserNotFound) {
		return User{}, "", err
	}
	account := accountOf(user)
	if !found {
		account = "email " + lowerASCII(strings.TrimSpace(email))
	}
	try := s.gate.newSignIn(account, c)
	if err := try.acquire(ctx); err != nil {
		return User{}, "", err
	}
	defer try.release()
	usable := isUsable(passwordHash)
	if found && !usable {
		s.limited.log(s.log, slog.LevelWarn, "password hash not usable", "user", user.ID)
	}
	if !usable {
		passwordHash = dummyHash(s.cfg.bcryptCost)
	}
	if !s.isPassword(passwordHash, password) || !usable {
		try.count()
		s.events.refused.Add(1)
		s.log.Info("sign-in refused", "user", user.ID, "client", c.addr)
		return User{}, "", errWrongPassword
	}
	s.gate.remember(account, c)
	return user, passwordHash, nil
}

// accountOf names a user's account to the gate. authenticate names emails that no account has otherwise, or
// somebody could use up an account's failures by signing in with its id.
func accountOf(user User) string { return "id " + user.ID }

// lowerASCII folds the letters whose case is disregarded when an account is looked up, and no others.
func lowerASCII(text string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'A' && r <= 'Z' {
			return r - 'A' + 'a'
		}
		return r
	}, text)
}

// isUsable tells whether hash is one of bcrypt, of a cost that others can wait for. A cost of 31 takes days.
func isUsable(hash string) bool {
	usable, _ := regexp.MatchString(`^\$2[aby]\$(0[4-9]|1[0-5])\$[./0-9A-Za-z]{53}$`, hash)
	return usable
}

// isPassword compares a password with a usable hash. Every no costs the same work, so that time does not
// tell whether the account exists. Where a hash is weaker than configured, comparing once more at each cost
// from its own up to the configured one adds up: 2^10 + 2^10 + 2^11 = 2^12. A stronger hash costs more,
// which configuring a lower cost accepts.
func (s *server) isPassword(hash, password string) bool {
	err := s.cfg.compareHash([]byte(hash), []byte(password))
	if err == nil {
		return true
	}
	cost, _ := bcrypt.Cost([]byte(hash)) // of a usable hash: no error
	for ; cost < s.cfg.bcryptCost; cost++ {
		s.cfg.compareHash([]byte(dummyHash(cost)), []byte(password))
	}
	return false
}

// dummyHash has the form of a bcrypt hash. It is of no known password.
func dummyHash(cost int) string {
	return fmt.Sprintf("$2a$%02d$%s", cost, strings.Repeat("u", 53))
}

// upgradeHash stores a password's hash anew if it is weaker than configured. It runs after the answer. If it
// fails, or too many wait for bcrypt, the next sign-in tries again. The queue counts all upgrades as one
// network.
func (s *server) upgradeHash(userID, oldHash, password string) {
	cost, _ := bcrypt.Cost([]byte(oldHash)) // it was compared: no error
	if cost >= s.cfg.bcryptCost {
		return
	}
	newHash, err := s.hashPassword(context.Background(), s.gate.newTry(netip.Prefix{}), password)
	if errors.Is(err, errTooBusy) {
		return
	}
	if err == nil {
		err = s.accounts.ReplacePasswordHash(context.Background(), userID, oldHash, newHash)
	}
	if err != nil {
		s.limited.log(s.log, slog.LevelWarn, "password hash not upgraded", "user", userID, "err", err)
	}
}

func (s *server) showUser(w http.ResponseWriter, r *http.Request) (int, any, error) {
	id := sessionID(r)
	if id == "" {
		return 0, nil, errNoSession
	}
	s.events.lookups.Add(1)
	user, err := s.sessions.Get(r.Context(), id)
	if s.sessionHealth.observe(r.Context(), err) != nil {
		return 0, nil, err
	}
	w.Header()["X-User-Id"] = []string{user.ID}
	return http.StatusOK, user, nil
}

// signOut answers 204 also where there is no session.
func (s *server) signOut(w http.ResponseWriter, r *http.Request) (int, any, error) {
	if id := sessionID(r); id != "" {
		err := s.deleteSession(r.Context(), id)
		if err != nil && !errors.Is(err, errNoSession) {
			return 0, nil, err
		}
		if err == nil {
			s.events.signedOut.Add(1)
			s.log.Info("signed out", "client", s.clientOf(r).addr)
		}
	}
	s.setSessionCookie(w, "")
	return http.StatusNoContent, nil, nil
}

// health asks both stores at the same time, so that two slow ones still answer within storeTimeout. It sends
// balancers away once the service is about to stop.
func (s *server) health(w http.ResponseWriter, r *http.Request) (int, any, error) {
	if s.draining.Load() {
		return 0, nil, retryLater(http.StatusServiceUnavailable, 2*time.Second,
			"The service is about to stop.")
	}
	ctx, cancel := context.WithTimeout(r.Context(), storeTimeout)
	defer cancel()
	sessions := make(chan error, 1)
	go func() { sessions <- s.sessionHealth.observe(ctx, s.sessions.Ping(ctx)) }()
	err := s.accountHealth.observe(ctx, s.accounts.Ping(ctx))
	if err := errors.Join(err, <-sessions); err != nil {
		return 0, nil, err
	}
	return http.StatusOK, map[string]string{"status": "ok"}, nil
}

// drain waits for the work that goes on after its answer, or for ctx to end.
func (s *server) drain(ctx context.Context) error {
	done := make(chan struct{})
	go func() {
		s.background.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

const cookieName = "session-id"

// sessionID returns the session id that the request's cookies name: the first one that is a UUID, or "".
// Other paths or domains may have set cookies of this name.
func sessionID(r *http.Request) string {
	for _, cookie := range r.CookiesNamed(cookieName) {
		if isUUID(cookie.Value) {
			return cookie.Value
		}
	}
	return ""
}

// setSessionCookie sends the session cookie; an empty id clears it.
func (s *server) setSessionCookie(w http.ResponseWriter, id string) {
	maxAge := int(s.cfg.sessionTTL / time.Second)
	if id == "" {
		maxAge = -1 // written as Max-Age=0
	}
	http.SetCookie(w, &http.Cookie{
		Name:     cookieName,
		Value:    id,
		Path:     "/",
		MaxAge:   maxAge,
		HttpOnly: true,
		Secure:   s.cfg.cookieSecure,
		SameSite: http.SameSiteLaxMode,
	})
}

const (
	maxBody     = 16 << 10 // bytes
	maxName     = 100      // characters
	maxEmail    = 254      // bytes, RFC 5321 (erratum 1690)
	minPassword = 8        // bytes
	maxPassword = 72       // bytes: bcrypt reads no more
)

// field is a required string of a form. check returns what is wrong with it, in words for the client.
type field struct {
	name  string
	check func(text string) error
}

// readForm reads the request's body, one JSON object of at most maxBody, and returns the fields as they
// were typed. Every wrong one is in the problem. Keys are case-sensitive, as the original's were; those of
// a struct would not be.
func readForm(w http.ResponseWriter, r *http.Request, fields ...field) (map[string]string, error) {
	object, err := readObject(w, r)
	if err != nil {
		return nil, err
	}
	form := map[string]string{}
	wrong := map[string]string{}
	for _, f := range fields {
		var text *string
		err := json.Unmarshal(object[f.name], &text)
		if err != nil || text == nil {
			wrong[f.name] = "is required, as a string"
			continue
		}
		if err := f.check(*text); err != nil {
			wrong[f.name] = err.Error()
		}
		form[f.name] = *text
	}
	if len(wrong) > 0 {
		p := newProblem(http.StatusBadRequest, "Some fields cannot be accepted: see errors.")
		p.Errors = wrong
		return nil, p
	}
	return form, nil
}

// readObject reads the request's body as one JSON object.
func readObject(w http.ResponseWriter, r *http.Request) (map[string]json.RawMessage, error) {
	mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil && !errors.Is(err, mime.ErrInvalidMediaParameter) || mediaType != "application/json" {
		return nil, newProblem(http.StatusUnsupportedMediaType,
			"Send the body as JSON, with Content-Type: application/json.")
	}
	encoding := strings.Join(r.Header.Values("Content-Encoding"), ",")
	if encoding != "" && !strings.EqualFold(encoding, "identity") {
		return nil, newProblem(http.StatusUnsupportedMediaType,
			"Send the body plain, without compressing it: no Content-Encoding but identity is understood.")
	}
	http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout))
	text, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if _, tooLarge := errors.AsType[*http.MaxBytesError](err); tooLarge {
		return nil, newProblem(http.StatusRequestEntityTooLarge,
			fmt.Sprintf("The body is larger than %d bytes.", maxBody))
	}
	if err != nil {
		return nil, newProblem(http.StatusBadRequest, "The body did not arrive whole and in time.")
	}
	text = bytes.TrimPrefix(text, []byte("\ufeff")) // a byte order mark
	var object map[string]json.RawMessage
	if err := json.Unmarshal(text, &object); err != nil || object == nil || !utf8.Valid(text) {
		return nil, newProblem(http.StatusBadRequest,
			`The body is not one JSON object in UTF-8, such as {"email":"…","password":"…"}.`)
	}
	return object, nil
}

// checkName accepts what a person can be called: something that can be seen.
func checkName(text string) error {
	name := strings.TrimSpace(text)
	if n := utf8.RuneCountInString(name); n < 1 || n > maxName {
		return fmt.Errorf("must have 1 to %d characters", maxName)
	}
	for _, r := range name {
		if unicode.In(r, unicode.Cc, unicode.Zl, unicode.Zp, unicode.Bidi_Control) {
			return errors.New("must have no control characters, nor any that change the direction of writing")
		}
	}
	if !strings.ContainsFunc(name, isVisible) {
		return errors.New("must have a character that can be seen")
	}
	return nil
}

// isVisible tells whether r leaves a mark. Format characters, Hangul fillers and other default ignorable code
// points (Unicode, UAX #44) do not, nor does the blank of Braille.
func isVisible(r rune) bool {
	return !unicode.IsSpace(r) && !unicode.IsControl(r) && r != '\u2800' &&
		!unicode.In(r, unicode.Cf, unicode.Other_Default_Ignorable_Code_Point, unicode.Variation_Selector)
}

// checkEmail accepts what a browser's email field does, and letters beyond ASCII.
func checkEmail(text string) error {
	email := strings.TrimSpace(text)
	local, domain, _ := strings.Cut(email, "@")
	if local == "" || domain == "" || strings.Contains(domain, "@") || len(email) > maxEmail {
		return fmt.Errorf("must be an email address of at most %d bytes, such as ada@example.com", maxEmail)
	}
	for _, r := range email {
		if !unicode.IsPrint(r) || !isVisible(r) || strings.ContainsRune(`"()[]<>,:;\`, r) {
			return fmt.Errorf("must be an email address such as ada@example.com: it may not have %q", r)
		}
	}
	return nil
}

// checkPassword refuses NUL, as bcrypt takes "a" and "a\x00a" for the same.
func checkPassword(text string) error {
	if n := len(text); n < minPassword || n > maxPassword || strings.Contains(text, "\x00") {
		return fmt.Errorf("must have %d to %d bytes, without NUL", minPassword, maxPassword)
	}
	return nil
}

// checkGivenEmail is for sign-ins: accounts of the original obeyed no rule. One that has an empty email is
// open to nobody.
func checkGivenEmail(text string) error {
	if strings.TrimSpace(text) == "" {
		return errors.New("must not be empty")
	}
	return nil
}

// checkGivenPassword is for sign-ins. bcrypt takes NULs alone for the empty password. Accounts that the
// original made with that cannot be signed in to.
func checkGivenPassword(text string) error {
	if strings.Trim(firstBytes(text), "\x00") == "" {
		return errors.New("must not be empty")
	}
	return nil
}

// firstBytes returns what bcrypt reads of a password.
func firstBytes(password string) string { return password[:min(len(password), maxPassword)] }

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
	return &problem{Title: http.StatusText(status), Status: status, Detail: detail}
}

func retryLater(status int, after time.Duration, detail string) *problem {
	p := newProblem(status, detail)
	p.retryAfter = after
	return p
}

var (
	errWrongPassword = errors.New("wrong email or password")
	errTooBusy       = errors.New("too many sign-ins at once")
)

// throttledError tells a client how long its next try is refused, at least: tries in flight may yet fail.
type throttledError struct {
	wait time.Duration
}

func (e throttledError) Error() string { return fmt.Sprintf("throttled for %v", e.wait) }

// problemOf is the one place where an error becomes a status. It counts and logs what the operator should
// know, but for errors of the stores, which storeHealth has logged. The text of internal errors never
// reaches the client.
func (s *server) problemOf(r *http.Request, err error) *problem {
	if p, ok := errors.AsType[*problem](err); ok {
		return p
	}
	if throttled, ok := errors.AsType[throttledError](err); ok {
		s.events.throttled.Add(1)
		s.limited.log(s.log, slog.LevelInfo, "throttled", "path", r.URL.Path, "client", s.clientOf(r).addr)
		return retryLater(http.StatusTooManyRequests, throttled.wait,
			"Too many tries. Wait before the next one.")
	}
	switch {
	case errors.Is(err, errNoSession):
		return newProblem(http.StatusUnauthorized, "There is no session. Sign in.")
	case errors.Is(err, errWrongPassword):
		return newProblem(http.StatusUnauthorized, "The email or the password is wrong.")
	case errors.Is(err, errEmailTaken):
		return newProblem(http.StatusConflict,
			"This email is registered already. Sign in, or use another one.")
	case errors.Is(err, errTooBusy):
		s.events.tooBusy.Add(1)
		s.limited.log(s.log, slog.LevelWarn, "too busy", "path", r.URL.Path, "client", s.clientOf(r).addr)
		return retryLater(http.StatusServiceUnavailable, 2*queueTimeout,
			"Too many people are signing in. Try again.")
	case errors.Is(err, errUnavailable), errors.Is(err, context.Canceled): // the client has left
		return retryLater(http.StatusServiceUnavailable, 2*time.Second,
			"The service cannot reach its data. Try again.")
	}
	s.limited.log(s.log, slog.LevelError, "request failed",
		"method", r.Method, "path", r.URL.Path, "err", err)
	return newProblem(http.StatusInternalServerError, "The service failed. The fault is logged.")
}

// storeHealth counts and logs a store's errors, and logs when a store that was out of reach is back.
type storeHealth struct {
	log     *slog.Logger // with the store's name
	limited *limitedLog
	errors  atomic.Int64
	outage  atomic.Pointer[outage] // nil while the store answers
}

// outage is the time in which a store is out of reach.
type outage struct {
	since  time.Time
	latest time.Time // failure
}

// observe takes note of an operation's error, and returns it. Every operation comes here, but for
// ReplacePasswordHash, whose failing has a line of its own. An operation whose client has left says nothing
// of the store.
func (h *storeHealth) observe(ctx context.Context, err error) error {
	switch {
	case err != nil && errors.Is(ctx.Err(), context.Canceled):
	case !errors.Is(err, errUnavailable):
		h.answered()
	case errors.Is(err, errRefused):
		h.errors.Add(1)
		h.limited.log(h.log, slog.LevelError, "store refuses", "err", err)
	default:
		h.errors.Add(1)
		h.limited.log(h.log, slog.LevelError, "store out of reach", "err", err)
		now := time.Now()
		o := outage{since: now, latest: now}
		if before := h.outage.Load(); before != nil {
			o.since = before.since
		}
		h.outage.Store(&o)
	}
	return err
}

// answered ends an outage once nothing has failed for a second: of a cluster one node may be out of reach
// while others answer.
func (h *storeHealth) answered() {
	o := h.outage.Load()
	if o == nil || time.Since(o.latest) < time.Second || !h.outage.CompareAndSwap(o, nil) {
		return
	}
	h.log.Info("store is back", "away", time.Since(o.since).Round(time.Millisecond).String())
}

// away returns the time since the outage began, 0 if there is none.
func (h *storeHealth) away() time.Duration {
	o := h.outage.Load()
	if o == nil {
		return 0
	}
	return time.Since(o.since)
}

// client is who sent a request.
type client struct {
	addr  netip.Addr
	named bool // by a trusted proxy
}

// network is what the limits count: an IPv4 address, or an IPv6 /64, all of which one host usually has. A
// NAT64 (RFC 6052) gives all IPv4 clients addresses of one /64, so the IPv4 address in those counts.
func (c client) network() netip.Prefix {
	addr := c.addr
	if netip.MustParsePrefix("64:ff9b::/96").Contains(addr) {
		full := addr.As16()
		addr = netip.AddrFrom4([4]byte(full[12:]))
	}
	bits := 64
	if addr.Is4() {
		bits = 32
	}
	network, _ := addr.Prefix(bits) // the zero Prefix for an address that is none
	return network
}

// looksLikeProxy tells whether this is probably a proxy that nobody told us to trust, and no client.
func (c client) looksLikeProxy() bool {
	return !c.named && (c.addr.IsLoopback() || c.addr.IsPrivate())
}

// clientOf returns the peer's address, or what trusted proxies say of it: X-Forwarded-For is read from the
// right, where each proxy adds its peer, as long as the address so far is a trusted proxy's.
func (s *server) clientOf(r *http.Request) client {
	peer, _ := netip.ParseAddrPort(r.RemoteAddr)
	c := client{addr: unmapped(peer.Addr())}
	forwarded := strings.Join(r.Header.Values("X-Forwarded-For"), ",")
	if forwarded == "" {
		return c
	}
	for _, hop := range slices.Backward(strings.Split(forwarded, ",")) {
		if !s.isTrusted(c.addr) {
			break
		}
		addr, ok := parseHop(hop)
		if !ok {
			break
		}
		c = client{addr: addr, named: true}
	}
	if !c.named && !s.isTrusted(c.addr) && r.Method == http.MethodPost {
		s.warnOfProxy.Do(func() {
			s.log.Warn("X-Forwarded-For from a peer that TRUSTED_PROXIES does not name: "+
				"if it is your proxy, all its clients share one limit", "client", c.addr)
		})
	}
	return c
}

func (s *server) isTrusted(addr netip.Addr) bool {
	return slices.ContainsFunc(s.cfg.trustedProxies, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// parseHop reads an entry of X-Forwarded-For: an address, which may be in quotes, in brackets or with a port.
func parseHop(text string) (netip.Addr, bool) {
	text = strings.Trim(strings.TrimSpace(text), `"`)
	if addrPort, err := netip.ParseAddrPort(text); err == nil {
		return unmapped(addrPort.Addr()), true
	}
	if inner, ok := strings.CutPrefix(text, "["); ok {
		text = strings.TrimSuffix(inner, "]")
	}
	addr, err := netip.ParseAddr(text)
	return unmapped(addr), err == nil
}

// unmapped returns an IPv4 address as such, and any without its zone.
func unmapped(addr netip.Addr) netip.Addr { return addr.Unmap().WithZone("") }

// limitedLog is for what clients can cause at will. It logs each message of a logger at most once a second,
// with the number of events since its last line. Each store has a logger of its own.
type limitedLog struct {
	mu    sync.Mutex
	lines map[lineKey]*limitedLine
}

type lineKey struct {
	logger *slog.Logger
	level  slog.Level
	msg    string
}

// limitedLine holds the events since a message's last line, which is less than a second old.
type limitedLine struct {
	args  []any // of the latest event
	count int
}

func (l *limitedLog) log(logger *slog.Logger, level slog.Level, msg string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	key := lineKey{logger, level, msg}
	line := l.lines[key]
	isFirst := line == nil
	if isFirst {
		line = &limitedLine{}
		l.lines[key] = line
	}
	line.args = args
	line.count++
	if isFirst {
		l.write(key)
	}
}

// write logs the events since the last line, if there are any, and calls itself again in a second. The caller
// holds l.mu.
func (l *limitedLog) write(key lineKey) {
	line := l.lines[key]
	if line == nil || line.count == 0 {
		delete(l.lines, key)
		return
	}
	key.logger.Log(context.Background(), key.level, key.msg, append(line.args, "count", line.count)...)
	line.count = 0
	time.AfterFunc(time.Second, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.write(key)
	})
}

// flush logs what has not been logged yet, at the end of the service.
func (l *limitedLog) flush() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for key := range l.lines {
		l.write(key)
	}
}

const (
	maxQueue = 256          // tries that wait
	maxLine  = maxQueue / 4 // those of one network
	maxKnown = 1 << 17      // known pairs, some 5 MB; past that some are forgotten at random
)

// gate decides which tries to sign in or to register may run bcrypt, and when: it is a rate limit on failures
// and a fair queue. Known pairs are exempt from one of the limits.
//
// The rate limit is the generic cell rate algorithm (GCRA): a count is the time at which its failures are
// forgiven, and each failure adds an interval. Nothing is reserved for tries in flight. They may all fail,
// and exceed a limit by fewer than there are slots; what follows waits for as much longer.
//
// The queue (start-time fair queueing) is sorted by turn. A try's turn is one more than the turn admitted
// last, or than that of its network's last try in the queue. So networks alternate: a long line of one holds
// up no other, and ever new networks do not starve who waits.
type gate struct {
	slots int // for bcrypt

	mu      sync.Mutex
	taken   int // slots
	turn    int // the latest that was admitted
	queue   []*try
	counts  map[countKey]time.Time
	sweepAt int               // how many counts there are when expired ones are deleted next
	known   map[countKey]bool // pairs of an account and a network from which it has signed in
}

// try is one try to sign in, to register or to store a hash anew.
type try struct {
	gate     *gate
	network  netip.Prefix
	limits   []limit
	turn     int
	admitted chan error // gets nil when the try is admitted, or the reason why not
}

// limit allows burst failures at once, then one more each interval.
type limit struct {
	burst    int
	interval time.Duration
	key      countKey // of the count that it limits
}

// countKey is a hash of what is counted, as a client may send a long email.
type countKey [16]byte

func newCountKey(kind, account string, network netip.Prefix) countKey {
	sum := sha256.Sum256([]byte(kind + " " + network.String() + " " + account))
	return countKey(sum[:16])
}

func newGate(slots int) *gate {
	return &gate{slots: slots, counts: map[countKey]time.Time{}, known: map[countKey]bool{}}
}

// newTry returns a try without limits.
func (g *gate) newTry(network netip.Prefix) *try {
	return &try{gate: g, network: network, admitted: make(chan error, 1)}
}

// newRegistration returns a try to register.
func (g *gate) newRegistration(c client) *try {
	t := g.newTry(c.network())
	t.limitNetwork(c)
	return t
}

// newSignIn returns a try to sign in to an account.
func (g *gate) newSignIn(account string, c client) *try {
	t := g.newTry(c.network())
	t.limitNetwork(c)
	pair := newCountKey("pair", account, t.network)
	t.limits = append(t.limits, limit{burst: 10, interval: time.Minute, key: pair})
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.known[pair] {
		key := newCountKey("account", account, netip.Prefix{})
		t.limits = append(t.limits, limit{burst: 100, interval: time.Minute / 10, key: key})
	}
	return t
}

// limitNetwork adds the limit of all tries from a client's network. A proxy's is not limited.
func (t *try) limitNetwork(c client) {
	if !c.looksLikeProxy() {
		key := newCountKey("network", "", t.network)
		t.limits = append(t.limits, limit{burst: 100, interval: time.Minute / 10, key: key})
	}
}

// load returns how many slots are taken and how many tries wait.
func (g *gate) load() (taken, waiting int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.taken, len(g.queue)
}

// acquire waits for a slot, which release gives back, or for ctx to end; then the error is ctx's cause. It is
// a throttledError where a limit is reached, errTooBusy where too many wait already.
func (t *try) acquire(ctx context.Context) error {
	if err := t.gate.enqueue(t); err != nil {
		return err
	}
	select {
	case err := <-t.admitted:
		return err
	case <-ctx.Done():
		t.cancel()
		return context.Cause(ctx)
	}
}

// enqueue puts t into the queue, unless it could only be refused.
func (g *gate) enqueue(t *try) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if wait := g.wait(t.limits, time.Now()); wait > 0 {
		return throttledError{wait}
	}
	t.turn = g.turn + 1
	line := 0
	for _, other := range g.queue {
		if other.network == t.network {
			line++
			t.turn = max(t.turn, other.turn+1)
		}
	}
	if line >= maxLine {
		return errTooBusy
	}
	place := len(g.queue)
	for place > 0 && g.queue[place-1].turn > t.turn {
		place--
	}
	g.queue = slices.Insert(g.queue, place, t)
	if len(g.queue) > maxQueue { // the end of the longest line goes, t itself if none is longer
		g.queue[maxQueue].admitted <- errTooBusy
		g.queue = g.queue[:maxQueue]
	}
	g.admit()
	return nil
}

// admit gives the free slots to the next tries in the queue, and refuses those that have reached a limit. The
// caller holds g.mu.
func (g *gate) admit() {
	now := time.Now()
	for g.taken < g.slots && len(g.queue) > 0 {
		t := g.queue[0]
		g.queue = slices.Delete(g.queue, 0, 1)
		if wait := g.wait(t.limits, now); wait > 0 {
			t.admitted <- throttledError{wait}
			continue
		}
		g.taken++
		g.turn = t.turn
		t.admitted <- nil
	}
}

// wait returns how long it takes until none of the limits is reached: 0 if none is. A limit is reached
// when more than burst-1 intervals are left. The caller holds g.mu.
func (g *gate) wait(limits []limit, now time.Time) time.Duration {
	var wait time.Duration
	for _, l := range limits {
		left := max(0, g.counts[l.key].Sub(now)) // 0 without a count
		wait = max(wait, left-time.Duration(l.burst-1)*l.interval)
	}
	return wait
}

// cancel takes t out of the queue, or gives back the slot that it has got meanwhile.
func (t *try) cancel() {
	g := t.gate
	g.mu.Lock()
	place := slices.Index(g.queue, t)
	if place >= 0 {
		g.queue = slices.Delete(g.queue, place, place+1)
	}
	g.mu.Unlock()
	if place >= 0 {
		return
	}
	if err := <-t.admitted; err == nil {
		t.release()
	}
}

// release gives back the slot of a try that was admitted.
func (t *try) release() {
	g := t.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	g.taken--
	g.admit()
}

// count counts a try against its limits: a sign-in that failed, or a registration. Only tries that ran bcrypt
// are counted, so the map cannot grow faster than bcrypt runs. It is swept when it has doubled.
func (t *try) count() {
	g := t.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	if len(g.counts) >= g.sweepAt {
		maps.DeleteFunc(g.counts, func(_ countKey, end time.Time) bool { return end.Before(now) })
		g.sweepAt = 2*len(g.counts) + 1000
	}
	for _, l := range t.limits {
		end := g.counts[l.key]
		if end.Before(now) {
			end = now
		}
		g.counts[l.key] = end.Add(l.interval)
	}
}

// remember notes that an account has signed in or registered from c's network. Its failures from there are
// forgiven, and other networks' failures do not keep it out.
func (g *gate) remember(account string, c client) {
	pair := newCountKey("pair", account, c.network())
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.counts, pair)
	for other := range g.known {
		if len(g.known) < maxKnown {
			break
		}
		delete(g.known, other)
	}
	g.known[pair] = true
}
