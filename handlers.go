// HTTP: the routes and their handlers, cookies, JSON and problems, and the gate, which keeps sign-ins in
// bounds.

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"expvar"
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
	cfg          serverConfig
	accounts     *database
	sessions     SessionStore
	gate         *gate
	log          *slog.Logger
	repeats      *repeats
	accountWatch *storeWatch
	sessionWatch *storeWatch
	mux          *http.ServeMux
	paths        map[string]bool // that have a route
	crossOrigin  http.CrossOriginProtection
	draining     atomic.Bool    // the service is about to stop: each answer closes its connection
	background   sync.WaitGroup // work that goes on after its answer
	warnOfProxy  sync.Once
	started      time.Time
	inFlight     atomic.Int64 // requests
	answers      expvar.Map   // how many, by route and status
	events       serverEvents
}

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
	repeats := newRepeats(log)
	s := &server{
		cfg:          cfg,
		accounts:     db,
		sessions:     sessions,
		gate:         newGate(cfg.bcryptSlots),
		log:          log,
		repeats:      repeats,
		accountWatch: &storeWatch{store: "accounts", log: log, repeats: repeats},
		sessionWatch: &storeWatch{store: "sessions", log: log, repeats: repeats},
		mux:          http.NewServeMux(),
		paths:        map[string]bool{},
		started:      time.Now(),
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
		"session_store_errors_total": s.sessionWatch.errors.Load(),
		"account_store_errors_total": s.accountWatch.errors.Load(),
		"answers_total":              json.RawMessage(s.answers.String()),
		"bcrypts_running":            running,
		"sign_ins_waiting":           waiting,
		"requests_in_flight":         s.inFlight.Load(),
		"uptime_seconds":             time.Since(s.started).Seconds(),
		"sessions_away_seconds":      s.sessionWatch.away().Seconds(),
		"accounts_away_seconds":      s.accountWatch.away().Seconds(),
	}
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
		s.answer(w, r, 0, nil, newProblem(http.StatusForbidden, "A browser sent this from another site. "+
			"Send it from the service's own origin. A proxy in front of it must pass on the Host header."))
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
	header["Cache-Control"] = []string{"no-store"}
	header["X-Content-Type-Options"] = []string{"nosniff"}
	// Before net/http sends an answer it reads what is left of the request's body, so that it finds the
	// next request. Some proxies announce a body and send none. No method but POST has one, so the others
	// do not wait for it: nothing on that connection is taken for a next request.
	hasBody := r.ContentLength != 0 && r.Method != http.MethodPost
	if hasBody || s.draining.Load() {
		header["Connection"] = []string{"close"}
	}
	contentType := "application/json"
	if err != nil {
		p := s.problemOf(r, err)
		if p.retryAfter > 0 {
			seconds := (p.retryAfter + time.Second - 1) / time.Second
			header["Retry-After"] = []string{strconv.Itoa(int(seconds))}
		}
		status = p.Status
		body = p
		contentType = "application/problem+json"
	}
	s.answers.Add(strings.TrimSpace(r.Pattern+" "+strconv.Itoa(status)), 1) // no pattern: no route
	if body == nil {
		w.WriteHeader(status)
		return
	}
	text, _ := json.Marshal(body) // structs and maps of strings: it cannot fail
	header["Content-Type"] = []string{contentType}
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
	try := s.gate.newRegistration(client)
	defer try.leave()
	passwordHash, err := s.hashForRegistration(r.Context(), form, try)
	if err != nil {
		return 0, nil, err
	}
	ctx, cancel := context.WithTimeout(r.Context(), storeTimeout)
	defer cancel()
	user, id, err := s.createAccount(ctx, form, passwordHash, try)
	if err != nil {
		return 0, nil, err
	}
	s.gate.rememberAccount(accountOf(user), client)
	if old := sessionID(r); old != "" {
		s.deleteSession(ctx, old) // if that fails, the log says so; the account is made
	}
	s.events.registered.Add(1)
	s.log.Info("registered", "user", user.ID, "client", client.addr)
	s.setSessionCookie(w, id)
	return http.StatusCreated, registration{User: user, SessionID: id}, nil
}

// hashForRegistration returns the hash of a form's password.
func (s *server) hashForRegistration(
	ctx context.Context, form map[string]string, try *try,
) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, queueTimeout, errTooBusy)
	defer cancel()
	if err := try.enter(ctx); err != nil {
		return "", err
	}
	defer try.freeSlot()
	hash, err := bcrypt.GenerateFromPassword([]byte(form["password"]), s.cfg.bcryptCost)
	if err != nil {
		return "", fmt.Errorf("hashing a password: %w", err)
	}
	return string(hash), nil
}

// createAccount makes an account and its first session, and returns the session's id. It spans two stores,
// without half states: the session comes first, and is deleted when the account cannot follow. Nobody knows
// its id before that.
func (s *server) createAccount(
	ctx context.Context, form map[string]string, passwordHash string, try *try,
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
	err = s.sessionWatch.see(ctx, s.sessions.Create(ctx, id, user, s.cfg.sessionTTL))
	if err != nil {
		return User{}, "", err
	}
	err = s.accountWatch.see(ctx, s.accounts.InsertUser(ctx, user, form["email"], passwordHash))
	if err == nil || errors.Is(err, errEmailTaken) {
		try.fail() // registrations count, whatever comes of them
	}
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
	return s.sessionWatch.see(ctx, s.sessions.Delete(ctx, id))
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
	err = s.sessionWatch.see(ctx, s.sessions.Create(ctx, id, user, s.cfg.sessionTTL))
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
	found := err == nil
	if s.accountWatch.see(ctx, err) != nil && !errors.Is(err, errUserNotFound) {
		return User{}, "", err
	}
	account := accountOf(user)
	if !found {
		account = "email " + strings.ToLower(strings.TrimSpace(email))
	}
	try := s.gate.newSignIn(account, c)
	if err := try.enter(ctx); err != nil {
		return User{}, "", err
	}
	defer try.leave()
	usable := isUsable(passwordHash)
	if found && !usable {
		s.repeats.log(slog.LevelWarn, "password hash not usable", "user", user.ID)
	}
	if !usable {
		passwordHash = dummyHash(s.cfg.bcryptCost)
	}
	if !s.isPassword(passwordHash, password) || !usable {
		try.fail()
		s.events.refused.Add(1)
		s.log.Info("sign-in refused", "user", user.ID, "client", c.addr)
		return User{}, "", errWrongPassword
	}
	try.succeed()
	return user, passwordHash, nil
}

// accountOf names a user's account to the gate. Emails that no account has are named otherwise, or somebody
// could use up an account's failures by signing in with its id.
func accountOf(user User) string { return "id " + user.ID }

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
// fails, or too many wait for bcrypt, the next sign-in tries again.
func (s *server) upgradeHash(userID, oldHash, password string) {
	cost, _ := bcrypt.Cost([]byte(oldHash)) // it was compared: no error
	if cost >= s.cfg.bcryptCost {
		return
	}
	newHash, err := s.hashAnew(password)
	if errors.Is(err, errTooBusy) {
		return
	}
	if err == nil {
		err = s.accounts.ReplacePasswordHash(context.Background(), userID, oldHash, newHash)
	}
	if err != nil {
		s.repeats.log(slog.LevelWarn, "password hash not upgraded", "user", userID, "err", err)
	}
}

// hashAnew hashes what bcrypt reads of a password. All that is stored anew stands in one line, that of no
// network.
func (s *server) hashAnew(password string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(context.Background(), queueTimeout, errTooBusy)
	defer cancel()
	try := s.gate.newTry(netip.Prefix{})
	if err := try.enter(ctx); err != nil {
		return "", err
	}
	defer try.leave()
	hash, err := bcrypt.GenerateFromPassword([]byte(firstBytes(password)), s.cfg.bcryptCost)
	return string(hash), err
}

func (s *server) showUser(w http.ResponseWriter, r *http.Request) (int, any, error) {
	id := sessionID(r)
	if id == "" {
		return 0, nil, errNoSession
	}
	s.events.lookups.Add(1)
	user, err := s.sessions.Get(r.Context(), id)
	if s.sessionWatch.see(r.Context(), err) != nil {
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
	go func() { sessions <- s.sessionWatch.see(ctx, s.sessions.Ping(ctx)) }()
	if err := s.accountWatch.see(ctx, s.accounts.Ping(ctx)); err != nil {
		return 0, nil, err
	}
	if err := <-sessions; err != nil {
		return 0, nil, err
	}
	return http.StatusOK, map[string]string{"status": "ok"}, nil
}

// finish waits for the work that goes on after its answer, or for ctx to end.
func (s *server) finish(ctx context.Context) error {
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
// Other paths or domains may have set cookies of this name. Every lookup comes here: r.CookiesNamed would
// cost it half a microsecond and two allocations more, some 2 %.
func sessionID(r *http.Request) string {
	for _, line := range r.Header["Cookie"] {
		for pair := range strings.SplitSeq(line, ";") {
			name, value, _ := strings.Cut(strings.Trim(pair, " \t"), "=")
			if name != cookieName {
				continue
			}
			if len(value) > 1 && value[0] == '"' && value[len(value)-1] == '"' {
				value = value[1 : len(value)-1] // RFC 6265, section 4.1.1
			}
			if isUUID(value) {
				return value
			}
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

// throttledError tells a client that it has to wait before its next try counts.
type throttledError struct {
	wait time.Duration
}

func (e throttledError) Error() string { return fmt.Sprintf("throttled for %v", e.wait) }

// problemOf is the one place where an error becomes a status. It counts and logs what the operator should
// know, but for errors of the stores, which their storeWatch has logged. The text of internal errors never
// reaches the client.
func (s *server) problemOf(r *http.Request, err error) *problem {
	if p, ok := errors.AsType[*problem](err); ok {
		return p
	}
	if throttled, ok := errors.AsType[throttledError](err); ok {
		s.events.throttled.Add(1)
		s.repeats.log(slog.LevelInfo, "throttled", "path", r.URL.Path, "client", s.clientOf(r).addr)
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
		s.repeats.log(slog.LevelWarn, "too busy", "path", r.URL.Path, "client", s.clientOf(r).addr)
		return retryLater(http.StatusServiceUnavailable, 2*queueTimeout,
			"Too many people are signing in. Try again.")
	case errors.Is(err, errUnavailable), errors.Is(err, context.Canceled): // the client has left
		return retryLater(http.StatusServiceUnavailable, 2*time.Second,
			"The service cannot reach its data. Try again.")
	}
	s.repeats.log(slog.LevelError, "request failed", "method", r.Method, "path", r.URL.Path, "err", err)
	return newProblem(http.StatusInternalServerError, "The service failed. The fault is logged.")
}

// storeWatch tells the operator how a store is: it counts and logs the store's errors, and logs its return.
// It sees how each operation ends, but for ReplacePasswordHash, whose failing has a line of its own.
type storeWatch struct {
	store   string // its name in the log
	log     *slog.Logger
	repeats *repeats
	errors  atomic.Int64
	outage  atomic.Pointer[outage] // nil while the store answers
}

// outage is the time in which a store was out of reach.
type outage struct {
	since  time.Time
	latest time.Time // failure
}

// see looks at how an operation of the store ended, and returns its error.
func (w *storeWatch) see(ctx context.Context, err error) error {
	switch {
	case err != nil && errors.Is(ctx.Err(), context.Canceled): // the client has left, which says nothing
	case !errors.Is(err, errUnavailable):
		w.answered()
	case errors.Is(err, errRefused):
		w.errors.Add(1)
		w.repeats.log(slog.LevelError, "store refuses", "store", w.store, "err", err)
	default:
		w.errors.Add(1)
		w.repeats.log(slog.LevelError, "store out of reach", "store", w.store, "err", err)
		now := time.Now()
		since := now
		if before := w.outage.Load(); before != nil {
			since = before.since
		}
		w.outage.Store(&outage{since: since, latest: now})
	}
	return err
}

// answered ends an outage. Of a cluster one node may be away while the others answer: the store is back once
// nothing has failed for a second.
func (w *storeWatch) answered() {
	o := w.outage.Load()
	if o == nil || time.Since(o.latest) < time.Second || !w.outage.CompareAndSwap(o, nil) {
		return
	}
	away := time.Since(o.since).Round(time.Millisecond)
	w.log.Info("store is back", "store", w.store, "away", away.String())
}

// away returns for how long the store has been out of reach, 0 if it is not.
func (w *storeWatch) away() time.Duration {
	o := w.outage.Load()
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

// network is what the limits count: an IPv4 address, or an IPv6 /64, all of which one host usually has.
func (c client) network() netip.Prefix {
	bits := 64
	if c.addr.Is4() {
		bits = 32
	}
	network, _ := c.addr.Prefix(bits) // the zero Prefix for an address that is none
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

// repeats logs each message at most once a second, with the number of events since its last line. It is for
// what clients can cause at will.
type repeats struct {
	logger *slog.Logger
	mu     sync.Mutex
	lines  map[string]*repeated // by message
}

// repeated is a message, and what has happened since its last line.
type repeated struct {
	level  slog.Level
	args   []any // of the latest event
	count  int
	recent bool // the last line is less than a second old
}

func newRepeats(logger *slog.Logger) *repeats {
	return &repeats{logger: logger, lines: map[string]*repeated{}}
}

func (r *repeats) log(level slog.Level, msg string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	line := r.lines[msg]
	if line == nil {
		line = &repeated{}
		r.lines[msg] = line
	}
	line.level = level
	line.args = args
	line.count++
	if !line.recent {
		r.write(msg, line)
	}
}

// write writes what has happened, if anything has, and does so again in a second. The caller holds r.mu.
func (r *repeats) write(msg string, line *repeated) {
	line.recent = line.count > 0
	if line.count == 0 {
		return
	}
	r.logger.Log(context.Background(), line.level, msg, append(line.args, "count", line.count)...)
	line.count = 0
	time.AfterFunc(time.Second, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.write(msg, line)
	})
}

// flush writes what has not been written yet, at the end of the service.
func (r *repeats) flush() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, msg := range slices.Sorted(maps.Keys(r.lines)) {
		r.write(msg, r.lines[msg])
	}
}

// Bounds of the gate. Counts take up to 25 MB, known pairs 10. Past that some are forgotten at random.
const (
	maxQueue  = 256          // tries that wait
	maxLine   = maxQueue / 4 // those of one network
	maxCounts = 1 << 17
	maxKnown  = 1 << 17
)

// gate decides which tries to sign in or to register may run bcrypt, and when. It lets in as many as there
// are slots, as long as none of them could exceed a limit on failures.
//
// A try that has to wait stands in a queue that is sorted by turn. It has the turn after that of the latest
// one let in, or after that of its network's last one in the queue. So networks alternate: a long line of
// one holds up no other, and ever new networks pass nobody by.
type gate struct {
	slots int

	mu     sync.Mutex
	taken  int // slots
	turn   int // the latest that was let in
	queue  []*try
	counts map[countKey]count
	known  map[countKey]bool // pairs of an account and a network from which it has signed in
}

// try is one try to sign in, to register or to store a hash anew.
type try struct {
	gate    *gate
	network netip.Prefix
	limits  []limit
	pair    countKey // of account and network; succeed uses it
	turn    int
	decided chan error // gets nil when the try is let in, or the reason why not
	inSlot  bool
	running bool // let in, and not ended: has room for a failure in each of its counts
}

// limit allows burst failures at once, then one more each interval.
type limit struct {
	burst    int
	interval time.Duration
	key      countKey // of the count that it limits
}

// countKey is a hash of what is counted, as a client may send a long email.
type countKey [sha256.Size]byte

func newCountKey(kind, account string, network netip.Prefix) countKey {
	return sha256.Sum256([]byte(kind + " " + network.String() + " " + account))
}

// count holds the failures of one key, as the generic cell rate algorithm does.
type count struct {
	emptyAt time.Time // when all are forgiven; each failure adds an interval
	running int       // tries that may yet fail
}

func (c count) isEmpty(now time.Time) bool { return c.running == 0 && !c.emptyAt.After(now) }

func newGate(slots int) *gate {
	return &gate{slots: slots, counts: map[countKey]count{}, known: map[countKey]bool{}}
}

// newTry returns a try that no limit holds up.
func (g *gate) newTry(network netip.Prefix) *try {
	return &try{gate: g, network: network, decided: make(chan error, 1)}
}

// newRegistration returns a try to register.
func (g *gate) newRegistration(c client) *try {
	t := g.newTry(c.network())
	if !c.looksLikeProxy() {
		key := newCountKey("network", "", t.network)
		t.limits = append(t.limits, limit{burst: 100, interval: time.Minute / 10, key: key})
	}
	return t
}

// newSignIn returns a try to sign in to an account.
func (g *gate) newSignIn(account string, c client) *try {
	t := g.newRegistration(c)
	t.pair = newCountKey("pair", account, t.network)
	t.limits = append(t.limits, limit{burst: 10, interval: time.Minute, key: t.pair})
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.known[t.pair] {
		key := newCountKey("account", account, netip.Prefix{})
		t.limits = append(t.limits, limit{burst: 100, interval: time.Minute / 10, key: key})
	}
	return t
}

// load returns how many slots are taken and how many tries wait.
func (g *gate) load() (taken, waiting int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.taken, len(g.queue)
}

// enter waits until the try is let in, or for ctx to end; then the error is ctx's cause. It is a
// throttledError where a limit is reached, errTooBusy where too many wait already. Who was let in must call
// leave.
func (t *try) enter(ctx context.Context) error {
	if err := t.gate.queueUp(t); err != nil {
		return err
	}
	select {
	case err := <-t.decided:
		return err
	case <-ctx.Done():
		t.leave()
		return context.Cause(ctx)
	}
}

// queueUp decides on t at once, or puts it into the queue.
func (g *gate) queueUp(t *try) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.decide(t, time.Now()) { // who waits although a slot is free waits for room
		return nil
	}
	t.turn = g.turn + 1
	line := 0
	for _, other := range g.queue {
		if other.network == t.network {
			line++
			t.turn = max(t.turn, other.turn+1)
		}
	}
	if len(g.queue) >= maxQueue || line >= maxLine {
		return errTooBusy
	}
	place := len(g.queue)
	for place > 0 && g.queue[place-1].turn > t.turn {
		place--
	}
	g.queue = slices.Insert(g.queue, place, t)
	return nil
}

// decide lets t in or refuses it, and tells whether it did. The caller holds g.mu, as all those do that call
// what follows.
func (g *gate) decide(t *try, now time.Time) bool {
	wait, room := g.look(t.limits, now)
	if wait > 0 {
		t.decided <- throttledError{wait}
		return true
	}
	if !room || g.taken >= g.slots {
		return false
	}
	if len(g.counts)+len(t.limits) > maxCounts {
		g.forgetSome(now)
	}
	for _, l := range t.limits {
		c := g.counts[l.key]
		c.running++
		g.counts[l.key] = c
	}
	g.turn = max(g.turn, t.turn)
	g.taken++
	t.inSlot = true
	t.running = true
	t.decided <- nil
	return true
}

// look returns how long it takes until the failures so far leave room for one more: 0 if they do now. It also
// tells whether there would be room if all tries that run failed. A count has room for one more failure while
// at most burst-1 intervals are left until it is empty.
func (g *gate) look(limits []limit, now time.Time) (wait time.Duration, roomBesideRunning bool) {
	roomBesideRunning = true
	for _, l := range limits {
		c := g.counts[l.key]
		level := max(0, c.emptyAt.Sub(now)) // of the zero time, too, which is farther than a Duration holds
		most := time.Duration(l.burst-1) * l.interval
		wait = max(wait, level-most)
		if level+time.Duration(c.running)*l.interval > most {
			roomBesideRunning = false
		}
	}
	return wait, roomBesideRunning
}

// forgetSome makes room for an eighth of the counts: of those that are empty first, then of any.
func (g *gate) forgetSome(now time.Time) {
	maps.DeleteFunc(g.counts, func(_ countKey, c count) bool { return c.isEmpty(now) })
	for key, c := range g.counts {
		if len(g.counts) <= maxCounts-maxCounts/8 {
			return
		}
		if c.running == 0 {
			delete(g.counts, key)
		}
	}
}

// admit goes along the queue, and decides on whom it can.
func (g *gate) admit() {
	now := time.Now()
	waiting := g.queue[:0]
	for _, t := range g.queue {
		if !g.decide(t, now) {
			waiting = append(waiting, t)
		}
	}
	clear(g.queue[len(waiting):])
	g.queue = waiting
	if len(waiting) > 0 { // or who comes next would stand behind a line that was only passed over
		g.turn = min(g.turn, waiting[0].turn)
	}
}

// freeSlot gives back t's slot, not yet its room for a failure: for tries that go on without bcrypt.
func (t *try) freeSlot() {
	t.gate.mu.Lock()
	defer t.gate.mu.Unlock()
	t.gate.vacate(t)
	t.gate.admit()
}

func (g *gate) vacate(t *try) {
	if t.inSlot {
		t.inSlot = false
		g.taken--
	}
}

// fail ends a try that was let in, and counts it against its limits.
func (t *try) fail() {
	g := t.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	for _, l := range t.limits {
		c := g.counts[l.key]
		if c.emptyAt.Before(now) {
			c.emptyAt = now
		}
		c.emptyAt = c.emptyAt.Add(l.interval)
		g.counts[l.key] = c
	}
	g.end(t)
}

// succeed ends a sign-in that was let in. It clears the failures of the account from this network.
func (t *try) succeed() {
	g := t.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	c := g.counts[t.pair]
	c.emptyAt = time.Time{}
	g.counts[t.pair] = c
	g.remember(t.pair)
	g.end(t)
}

// leave ends a try without a verdict, wherever it stands. After fail or succeed it does nothing.
func (t *try) leave() {
	g := t.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	g.queue = slices.DeleteFunc(g.queue, func(other *try) bool { return other == t })
	g.end(t)
}

// end takes back all that t has, and lets others have it.
func (g *gate) end(t *try) {
	if !t.running {
		return
	}
	t.running = false
	now := time.Now()
	for _, l := range t.limits {
		c := g.counts[l.key]
		c.running--
		g.counts[l.key] = c
		if c.isEmpty(now) {
			delete(g.counts, l.key)
		}
	}
	g.vacate(t)
	g.admit()
}

// rememberAccount notes that an account belongs to somebody in this network: other networks' failures do not
// keep them out.
func (g *gate) rememberAccount(account string, c client) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.remember(newCountKey("pair", account, c.network()))
}

func (g *gate) remember(pair countKey) {
	for other := range g.known {
		if len(g.known) < maxKnown {
			break
		}
		delete(g.known, other)
	}
	g.known[pair] = true
}
