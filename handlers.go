// HTTP: the routes and their handlers, cookies, JSON and problems, and what keeps sign-ins in bounds: the
// throttle on failures and the gate in front of bcrypt.

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

// server answers requests.
type server struct {
	cfg         serverConfig
	db          *database
	sessions    SessionStore
	gate        *gate
	throttle    *throttle
	log         *slog.Logger
	repeats     *repeats
	mux         *http.ServeMux
	paths       map[string]bool // that have a route
	crossOrigin http.CrossOriginProtection
	draining    atomic.Bool    // the service is about to stop: each answer closes its connection
	background  sync.WaitGroup // work that goes on after its answer
	warnOfProxy sync.Once
	answers     map[answerKind]*atomic.Int64
	events      serverEvents
}

// answerKind is the key of the counters of answers.
type answerKind struct {
	pattern string // of the route, "" where there is none
	status  int
}

// serverEvents counts since the start.
type serverEvents struct {
	lookups     atomic.Int64 // sessions that the store was asked for
	registered  atomic.Int64
	signedIn    atomic.Int64
	signedOut   atomic.Int64
	refused     atomic.Int64 // sign-ins with a wrong email or password
	throttled   atomic.Int64
	tooBusy     atomic.Int64
	storeErrors atomic.Int64
}

// handler returns the status and the JSON of an answer, or an error, which becomes a problem.
type handler func(w http.ResponseWriter, r *http.Request) (status int, body any, err error)

func newServer(cfg serverConfig, db *database, sessions SessionStore, log *slog.Logger) *server {
	s := &server{
		cfg:      cfg,
		db:       db,
		sessions: sessions,
		gate:     newGate(cfg.bcryptSlots),
		throttle: newThrottle(),
		log:      log,
		repeats:  newRepeats(log),
		mux:      http.NewServeMux(),
		paths:    map[string]bool{},
		answers:  map[answerKind]*atomic.Int64{},
	}
	s.countAnswersOf("") // what has no route
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
	s.countAnswersOf(pattern)
	s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		status, body, err := handle(w, r)
		s.answer(w, r, status, body, err)
	})
}

// countAnswersOf makes the counters of a pattern's answers. All are made at the start, so requests read the
// map without a lock.
func (s *server) countAnswersOf(pattern string) {
	for _, status := range []int{200, 201, 204, 400, 401, 403, 404, 405, 409, 413, 415, 429, 500, 503} {
		s.answers[answerKind{pattern, status}] = new(atomic.Int64)
	}
}

// metrics returns what was counted since the start, and what is going on, by name.
func (s *server) metrics() map[string]int64 {
	running, waiting := s.gate.load()
	m := map[string]int64{
		"session lookups":   s.events.lookups.Load(),
		"registered":        s.events.registered.Load(),
		"signed in":         s.events.signedIn.Load(),
		"signed out":        s.events.signedOut.Load(),
		"sign-ins refused":  s.events.refused.Load(),
		"throttled":         s.events.throttled.Load(),
		"too busy":          s.events.tooBusy.Load(),
		"store errors":      s.events.storeErrors.Load(),
		"bcrypts running":   int64(running),
		"bcrypts waited on": int64(waiting),
	}
	for kind, count := range s.answers {
		if n := count.Load(); n > 0 {
			m[strings.TrimSpace(fmt.Sprintf("%s %d", kind.pattern, kind.status))] = n
		}
	}
	return m
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer func() {
		if p := recover(); p != nil {
			s.answer(w, r, 0, nil, fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
		}
	}()
	path := canonicalPath(r.URL)
	if s.crossOrigin.Check(r) != nil {
		s.answer(w, r, 0, nil, errCrossOrigin)
		return
	}
	if !s.paths[path] { // the mux would redirect some of them
		s.answer(w, r, 0, nil, errNoRoute)
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
	if s.draining.Load() {
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
	if count := s.answers[answerKind{r.Pattern, status}]; count != nil {
		count.Add(1)
	}
	if body == nil {
		w.WriteHeader(status)
		return
	}
	text, err := json.Marshal(body)
	if err != nil { // cannot be: it is structs and maps of strings
		panic(err)
	}
	header["Content-Type"] = []string{contentType}
	w.WriteHeader(status)
	w.Write(text)
}

// registration is the JSON answer of POST /user.
type registration struct {
	User      User   `json:"user"`
	SessionID string `json:"sessionId"`
}

// register makes an account and its first session. That spans two stores, without half states: the session
// comes first, and is deleted when the account cannot follow: its id is sent only after that. The session
// that the cookie named has ended by then, whether the account follows or not.
func (s *server) register(w http.ResponseWriter, r *http.Request) (int, any, error) {
	form, err := readForm(w, r,
		field{"name", checkName},
		field{"email", checkEmail},
		field{"password", checkPassword})
	if err != nil {
		return 0, nil, err
	}
	client := s.clientOf(r)
	try := s.throttle.registration(client)
	defer try.end()
	user, passwordHash, err := s.newAccount(r.Context(), form, client, try)
	if err != nil {
		return 0, nil, err
	}
	ctx, cancel := context.WithTimeout(r.Context(), storeTimeout)
	defer cancel()
	id, err := s.openSession(ctx, r, user)
	if err != nil {
		return 0, nil, err
	}
	err = s.db.InsertUser(ctx, user, form["email"], passwordHash)
	if err == nil || errors.Is(err, errEmailTaken) {
		try.charge()
	}
	if err != nil {
		s.discardSession(id)
		return 0, nil, err
	}
	s.throttle.remember(user.ID, client)
	s.events.registered.Add(1)
	s.log.Info("registered", "user", user.ID, "client", client.addr)
	s.setSessionCookie(w, id)
	return http.StatusCreated, registration{User: user, SessionID: id}, nil
}

// newAccount returns the user that a form describes and the hash of its password. Looking the email up only
// saves a bcrypt: InsertUser decides.
func (s *server) newAccount(
	ctx context.Context, form map[string]string, c client, try *attempt,
) (user User, passwordHash string, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, queuePatience, errTooBusy)
	defer cancel()
	place, err := s.admit(ctx, c, try)
	if err != nil {
		return User{}, "", err
	}
	defer place.leave()
	if err := s.db.EmailTaken(ctx, form["email"]); err != nil {
		if errors.Is(err, errEmailTaken) {
			try.charge()
		}
		return User{}, "", err
	}
	if err := place.wait(ctx); err != nil {
		return User{}, "", err
	}
	hash, err := bcrypt.GenerateFromPassword([]byte(form["password"]), s.cfg.bcryptCost)
	if err != nil {
		return User{}, "", fmt.Errorf("hashing a password: %w", err)
	}
	now := time.Now().UTC().Format(timeFormat)
	user = User{
		ID:        newUUID(),
		Name:      strings.TrimSpace(form["name"]),
		Email:     strings.TrimSpace(form["email"]),
		CreatedAt: now,
		UpdatedAt: now,
	}
	return user, string(hash), nil
}

// admit returns a place in the line of c's network for bcrypt. It refuses at once where a limit has been
// reached or the line is full; else it may wait, until ctx ends, for tries that run.
func (s *server) admit(ctx context.Context, c client, try *attempt) (*place, error) {
	if wait := try.wait(); wait > 0 {
		return nil, throttledError{wait}
	}
	place, err := s.gate.enter(c.network())
	if err != nil {
		return nil, err
	}
	if err := try.begin(ctx); err != nil {
		place.leave()
		return nil, err
	}
	return place, nil
}

// openSession makes a session and ends the one that the request's cookie names. It returns the new one's id.
func (s *server) openSession(ctx context.Context, r *http.Request, user User) (string, error) {
	id := newUUID()
	err := s.sessions.Create(ctx, id, user, s.cfg.sessionTTL)
	if errors.Is(err, errLost) { // the first session may have been made; nobody has its id
		id = newUUID()
		err = s.sessions.Create(ctx, id, user, s.cfg.sessionTTL)
	}
	if err != nil {
		return "", err
	}
	old := sessionID(r)
	if old == "" {
		return id, nil
	}
	if err := s.sessions.Delete(ctx, old); err != nil && !errors.Is(err, errNoSession) {
		s.discardSession(id)
		return "", err
	}
	return id, nil
}

// discardSession deletes a session whose id was not sent. Should that fail, the session expires.
func (s *server) discardSession(id string) {
	s.background.Go(func() { s.sessions.Delete(context.Background(), id) })
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
	id, err := s.openSession(ctx, r, user)
	if err != nil {
		return 0, nil, err
	}
	s.events.signedIn.Add(1)
	s.log.Info("signed in", "user", user.ID, "client", client.addr)
	s.background.Go(func() { s.upgradeHash(user.ID, passwordHash, form["password"]) })
	s.setSessionCookie(w, id)
	return http.StatusOK, user, nil
}

func (s *server) showUser(w http.ResponseWriter, r *http.Request) (int, any, error) {
	id := sessionID(r)
	if id == "" {
		return 0, nil, errNoSession
	}
	s.events.lookups.Add(1)
	user, err := s.sessions.Get(r.Context(), id)
	if err != nil {
		return 0, nil, err
	}
	w.Header()["X-User-Id"] = []string{user.ID}
	return http.StatusOK, user, nil
}

// signOut answers 204 also where there is no session.
func (s *server) signOut(w http.ResponseWriter, r *http.Request) (int, any, error) {
	if id := sessionID(r); id != "" {
		err := s.sessions.Delete(r.Context(), id)
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

// health asks both stores at the same time, so that two slow ones still answer within storeTimeout.
func (s *server) health(w http.ResponseWriter, r *http.Request) (int, any, error) {
	ctx, cancel := context.WithTimeout(r.Context(), storeTimeout)
	defer cancel()
	sessions := make(chan error, 1)
	go func() { sessions <- s.sessions.Ping(ctx) }()
	if err := s.db.Ping(ctx); err != nil {
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
// Other paths or domains may have set cookies of this name. Every lookup comes here, so it does not make an
// http.Cookie of each.
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

// authenticate returns the user whose email and password these are, and the password's hash.
func (s *server) authenticate(ctx context.Context, email, password string, c client) (User, string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, queuePatience, errTooBusy)
	defer cancel()
	user, passwordHash, err := s.db.UserByEmail(ctx, email)
	known := err == nil
	account := user.ID // whose count it is, however the email was typed
	if errors.Is(err, errUserNotFound) {
		account = strings.ToLower(strings.TrimSpace(email))
		passwordHash = dummyHash(s.cfg.bcryptCost)
	} else if err != nil {
		return User{}, "", err
	}
	try := s.throttle.signIn(account, c)
	place, err := s.admit(ctx, c, try)
	if err != nil {
		return User{}, "", err
	}
	defer place.leave()
	defer try.end()
	if err := place.wait(ctx); err != nil {
		return User{}, "", err
	}
	err = s.checkHash(passwordHash, password)
	if err == nil && !known {
		err = errWrongPassword
	}
	if err != nil {
		try.charge()
		if !errors.Is(err, errWrongPassword) {
			return User{}, "", fmt.Errorf("comparing with the password hash of user %s: %w", user.ID, err)
		}
		s.events.refused.Add(1)
		s.log.Info("sign-in refused", "user", user.ID, "client", c.addr)
		return User{}, "", err
	}
	try.succeed()
	return user, passwordHash, nil
}

// checkHash returns nil if hash is one of password, errWrongPassword if not. Every errWrongPassword costs
// the same work, so that time does not tell whether the account exists. Where a hash is weaker than
// configured, comparing once more at each cost from its own up to the configured one adds up: 2^10 + 2^10 +
// 2^11 = 2^12. A stronger hash costs more, which configuring a lower cost accepts.
func (s *server) checkHash(hash, password string) error {
	cost, err := bcrypt.Cost([]byte(hash))
	if err != nil {
		return err
	}
	err = s.cfg.compareHash([]byte(hash), []byte(password))
	if !errors.Is(err, bcrypt.ErrMismatchedHashAndPassword) {
		return err
	}
	for ; cost < s.cfg.bcryptCost; cost++ {
		s.cfg.compareHash([]byte(dummyHash(cost)), []byte(password))
	}
	return errWrongPassword
}

// dummyHash has the form of a bcrypt hash. It is of no known password.
func dummyHash(cost int) string {
	return fmt.Sprintf("$2a$%02d$%s", cost, strings.Repeat("u", 53))
}

// upgradeHash stores a password's hash anew if it is weaker than configured. It runs after the answer. If
// it fails, or bcrypt is needed for sign-ins, the next sign-in tries again.
func (s *server) upgradeHash(userID, oldHash, password string) {
	cost, err := bcrypt.Cost([]byte(oldHash))
	if err != nil || cost >= s.cfg.bcryptCost {
		return
	}
	newHash, err := s.hashIfIdle(password)
	if errors.Is(err, errTooBusy) {
		return
	}
	if err == nil {
		err = s.db.ReplacePasswordHash(context.Background(), userID, oldHash, newHash)
	}
	if err != nil {
		s.repeats.log(slog.LevelWarn, "password hash not upgraded", "user", userID, "err", err)
	}
}

// hashIfIdle hashes what bcrypt reads of a password. It returns errTooBusy if no slot is free or any
// sign-in waits.
func (s *server) hashIfIdle(password string) (string, error) {
	place := s.gate.enterIfIdle()
	if place == nil {
		return "", errTooBusy
	}
	defer place.leave()
	hash, err := bcrypt.GenerateFromPassword([]byte(firstBytes(password)), s.cfg.bcryptCost)
	return string(hash), err
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

// checkGivenEmail is for sign-ins: accounts of the original obeyed no rule.
func checkGivenEmail(text string) error {
	if text == "" {
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
	errNoRoute       = errors.New("no such route")
	errCrossOrigin   = errors.New("cross-origin request")
	errWrongPassword = errors.New("wrong email or password")
	errTooBusy       = errors.New("too many sign-ins at once")
)

// throttledError tells a client that it has to wait before its next try counts.
type throttledError struct {
	wait time.Duration
}

func (e throttledError) Error() string { return fmt.Sprintf("throttled for %v", e.wait) }

// problemOf is the one place where an error becomes a status. It counts and logs what the operator should
// know; the text of internal errors never reaches the client.
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
	case errors.Is(err, errNoRoute):
		return newProblem(http.StatusNotFound, "There is nothing at this path.")
	case errors.Is(err, errCrossOrigin):
		return newProblem(http.StatusForbidden, "A browser sent this from another site. Send it from the "+
			"service's own origin. A proxy in front of the service must pass on the Host header.")
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
		return retryLater(http.StatusServiceUnavailable, 2*queuePatience,
			"Too many people are signing in. Try again.")
	case errors.Is(err, context.Canceled), errors.Is(err, errUnavailable) && r.Context().Err() != nil:
		return s.storeProblem() // the client has left: nobody reads this
	case errors.Is(err, errRefused):
		s.events.storeErrors.Add(1)
		s.repeats.log(slog.LevelError, "store refuses", "err", err)
		return s.storeProblem()
	case errors.Is(err, errUnavailable):
		s.events.storeErrors.Add(1)
		s.repeats.log(slog.LevelError, "store out of reach", "err", err)
		return s.storeProblem()
	}
	s.log.Error("request failed", "method", r.Method, "path", r.URL.Path, "err", err)
	return newProblem(http.StatusInternalServerError, "The service failed. The fault is logged.")
}

func (s *server) storeProblem() *problem {
	return retryLater(http.StatusServiceUnavailable, 2*time.Second,
		"The service cannot reach its data. Try again.")
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

// isProxy tells whether this is probably a proxy that nobody told us to trust, and no client.
func (c client) isProxy() bool {
	return !c.named && (c.addr.IsLoopback() || c.addr.IsPrivate())
}

// clientOf returns the peer's address, or what trusted proxies say of it: X-Forwarded-For is read from the
// right, where each proxy adds its peer, as long as the address so far is a trusted proxy's.
func (s *server) clientOf(r *http.Request) client {
	peer, _ := netip.ParseAddrPort(r.RemoteAddr)
	c := client{addr: plainAddr(peer.Addr())}
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
		return plainAddr(addrPort.Addr()), true
	}
	if inner, ok := strings.CutPrefix(text, "["); ok {
		text = strings.TrimSuffix(inner, "]")
	}
	addr, err := netip.ParseAddr(text)
	return plainAddr(addr), err == nil
}

// plainAddr returns an IPv4 address as such, and any without its zone.
func plainAddr(addr netip.Addr) netip.Addr { return addr.Unmap().WithZone("") }

// repeats logs each message at most once a second, with the number of events since. It is for what clients
// can cause at will.
type repeats struct {
	logger *slog.Logger
	mu     sync.Mutex
	recent map[string]*repeated // by message: logged less than a second ago
}

// repeated is a message, and what has happened since its last line.
type repeated struct {
	level slog.Level
	count int
	args  []any // of the latest event
}

func newRepeats(logger *slog.Logger) *repeats {
	return &repeats{logger: logger, recent: map[string]*repeated{}}
}

func (l *repeats) log(level slog.Level, msg string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if event := l.recent[msg]; event != nil {
		event.count++
		event.args = args
		return
	}
	l.write(msg, &repeated{level: level, count: 1, args: args})
}

// write logs a message, which is not logged again for a second. The caller holds l.mu.
func (l *repeats) write(msg string, event *repeated) {
	l.logger.Log(context.Background(), event.level, msg, append(event.args, "count", event.count)...)
	l.recent[msg] = &repeated{level: event.level}
	time.AfterFunc(time.Second, func() { l.endSecond(msg) })
}

func (l *repeats) endSecond(msg string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	event := l.recent[msg]
	delete(l.recent, msg)
	if event != nil && event.count > 0 {
		l.write(msg, event)
	}
}

// flush logs what has not been yet, at the end of the service.
func (l *repeats) flush() {
	l.mu.Lock()
	messages := slices.Sorted(maps.Keys(l.recent))
	l.mu.Unlock()
	for _, msg := range messages {
		l.endSecond(msg)
	}
}

// A sign-in is answered within 10 s: queuePatience for the throttle and the queue, the rest for bcrypt, which
// takes 2 s at the highest cost, and for the stores.
const (
	bodyTimeout   = 10 * time.Second
	queuePatience = 5 * time.Second
	storeTimeout  = 2500 * time.Millisecond // for all that a request wants of the stores, in turn
	maxQueue      = 256                     // tries that wait for bcrypt
	maxLine       = maxQueue / 4            // those of one network
)

// gate lets in a few bcrypts at a time. Past them tries wait, bounded in number, each network in a line of
// its own; the lines take turns, so that a long one does not hold up another.
type gate struct {
	mu      sync.Mutex
	slots   int
	running int
	waiting int                    // places in all lines
	lines   map[netip.Prefix]*line // that have a place taken
	turns   []netip.Prefix         // the lines in which somebody waits for a slot, the next one first
}

// line is the queue of one network.
type line struct {
	places int      // those that have entered and have no slot yet
	queue  []*place // those that wait for a slot
}

// place is where one attempt stands: in a line, then in a slot.
type place struct {
	gate    *gate
	network netip.Prefix
	given   chan struct{} // closed when the slot is given
	inLine  bool
	inSlot  bool
}

func newGate(slots int) *gate {
	return &gate{slots: slots, lines: map[netip.Prefix]*line{}}
}

// enter takes a place in the network's line. It returns errTooBusy if that line or the whole queue is full.
func (g *gate) enter(network netip.Prefix) (*place, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	l := g.lines[network]
	if g.waiting >= maxQueue || l != nil && l.places >= maxLine {
		return nil, errTooBusy
	}
	if l == nil {
		l = &line{}
		g.lines[network] = l
	}
	l.places++
	g.waiting++
	return &place{gate: g, network: network, given: make(chan struct{}), inLine: true}, nil
}

// enterIfIdle gives a slot at once if one is free and nobody waits, else nil.
func (g *gate) enterIfIdle() *place {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.running >= g.slots || g.waiting > 0 {
		return nil
	}
	g.running++
	return &place{gate: g, inSlot: true}
}

// wait waits for a slot, or for ctx to end; then the error is ctx's cause.
func (p *place) wait(ctx context.Context) error {
	p.gate.queueUp(p)
	select {
	case <-p.given:
		return nil
	case <-ctx.Done():
		p.leave()
		return context.Cause(ctx)
	}
}

// leave gives up what the place has, in the line or in a slot. It may be called again.
func (p *place) leave() {
	g := p.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	if p.inLine {
		g.leaveLine(p)
	}
	if p.inSlot {
		p.inSlot = false
		g.running--
		g.giveSlots()
	}
}

// load returns how many bcrypts run and how many tries wait.
func (g *gate) load() (running, waiting int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.running, g.waiting
}

// queueUp lets p wait for a slot in its line.
func (g *gate) queueUp(p *place) {
	g.mu.Lock()
	defer g.mu.Unlock()
	l := g.lines[p.network]
	l.queue = append(l.queue, p)
	if len(l.queue) == 1 {
		g.turns = append(g.turns, p.network)
	}
	g.giveSlots()
}

// giveSlots gives what slots are free, one to each line in turn. The caller holds g.mu.
func (g *gate) giveSlots() {
	for g.running < g.slots && len(g.turns) > 0 {
		p := g.lines[g.turns[0]].queue[0]
		g.turns = g.turns[1:]
		others := len(g.lines[p.network].queue) > 1
		g.leaveLine(p)
		if others {
			g.turns = append(g.turns, p.network)
		}
		p.inSlot = true
		g.running++
		close(p.given)
	}
}

// leaveLine takes p out of its line, and the line out of the turns if nobody else waits in it. The caller
// holds g.mu.
func (g *gate) leaveLine(p *place) {
	p.inLine = false
	g.waiting--
	l := g.lines[p.network]
	l.places--
	l.queue = slices.DeleteFunc(l.queue, func(other *place) bool { return other == p })
	if len(l.queue) == 0 {
		g.turns = slices.DeleteFunc(g.turns, func(n netip.Prefix) bool { return n == p.network })
	}
	if l.places == 0 {
		delete(g.lines, p.network)
	}
}

// limit allows burst attempts at once, then one more each interval.
type limit struct {
	burst    int
	interval time.Duration
}

// How many counts, and how many pairs of account and network, the throttle remembers: some 10 MB of each.
// Past them it forgets some at random.
const (
	maxCounts = 1 << 17
	maxKnown  = 1 << 17
)

// throttle counts tries by account and network. It has three limits. Looking stores nothing. An account is
// a user's id, or a normalized email that nobody has.
//
// An attempt that runs reserves one failure, so attempts at the same moment cannot exceed a limit: the next
// one waits until one of them has ended.
type throttle struct {
	pair    limit // failed sign-ins for one account from one network
	account limit // failed sign-ins for one account from all networks
	network limit // failed sign-ins and registrations from one network

	mu     sync.Mutex
	counts map[countKey]*count
	known  map[countKey]bool // pairs of an account and a network from which it has signed in
	ended  chan struct{}     // closed, and made anew, when a try ends
}

// countKey is a hash of what is counted, as a client may send a long email.
type countKey [sha256.Size]byte

func newCountKey(kind, account string, network netip.Prefix) countKey {
	return sha256.Sum256([]byte(kind + " " + network.String() + " " + account))
}

// count is a leaky bucket in the form of the generic cell rate algorithm: each failure moves the time at
// which it is empty by the limit's interval.
type count struct {
	emptyAt time.Time
	running int
}

func (c *count) isEmpty(now time.Time) bool { return c.running == 0 && !c.emptyAt.After(now) }

// attempt is one try to sign in or to register.
type attempt struct {
	throttle *throttle
	limits   []keyedLimit
	pair     countKey // of a sign-in; succeed uses it
	running  bool
}

type keyedLimit struct {
	limit
	key countKey
}

func newThrottle() *throttle {
	return &throttle{
		pair:    limit{burst: 10, interval: time.Minute},
		account: limit{burst: 100, interval: time.Minute / 10},
		network: limit{burst: 100, interval: time.Minute / 10},
		counts:  map[countKey]*count{},
		known:   map[countKey]bool{},
		ended:   make(chan struct{}),
	}
}

// signIn returns a try to sign in to an account.
func (t *throttle) signIn(account string, c client) *attempt {
	a := t.registration(c)
	a.pair = newCountKey("pair", account, c.network())
	a.limits = append(a.limits, keyedLimit{t.pair, a.pair})
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.known[a.pair] {
		a.limits = append(a.limits, keyedLimit{t.account, newCountKey("account", account, netip.Prefix{})})
	}
	return a
}

// registration returns a try to register.
func (t *throttle) registration(c client) *attempt {
	a := &attempt{throttle: t}
	if !c.isProxy() {
		a.limits = append(a.limits, keyedLimit{t.network, newCountKey("network", "", c.network())})
	}
	return a
}

// remember exempts the pair of an account and a network from the limit on the account.
func (t *throttle) remember(account string, c client) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rememberPair(newCountKey("pair", account, c.network()))
}

// rememberPair is remember for a caller that holds t.mu.
func (t *throttle) rememberPair(pair countKey) {
	for other := range t.known {
		if len(t.known) < maxKnown {
			break
		}
		delete(t.known, other)
	}
	t.known[pair] = true
}

// wait returns how long it takes until another try would be let in, 0 if one would be now.
func (a *attempt) wait() time.Duration {
	a.throttle.mu.Lock()
	defer a.throttle.mu.Unlock()
	wait, _ := a.look()
	return wait
}

// look returns how long it takes until the failures so far leave room for a try, and whether there is room
// beside the tries that run. There is room for one where, with it, at most burst intervals are to go until
// the count is empty.
func (a *attempt) look() (wait time.Duration, roomBesideRunning bool) {
	now := time.Now()
	roomBesideRunning = true
	for _, l := range a.limits {
		c := a.throttle.counts[l.key]
		if c == nil {
			continue
		}
		level := max(0, c.emptyAt.Sub(now))
		room := time.Duration(l.burst-1) * l.interval
		wait = max(wait, level-room)
		if level+time.Duration(c.running)*l.interval > room {
			roomBesideRunning = false
		}
	}
	return wait, roomBesideRunning
}

// begin waits until there is room even if all attempts that run fail, or for ctx to end; then the error is
// ctx's cause. It is a throttledError where the limit has been reached.
func (a *attempt) begin(ctx context.Context) error {
	t := a.throttle
	for {
		t.mu.Lock()
		wait, room := a.look()
		if wait == 0 && room {
			a.run()
		}
		ended := t.ended
		t.mu.Unlock()
		if wait > 0 {
			return throttledError{wait}
		}
		if room {
			return nil
		}
		select {
		case <-ended:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// run reserves one failure in each of a's counts. The caller holds the throttle's mu, as look's does.
func (a *attempt) run() {
	t := a.throttle
	if len(t.counts)+len(a.limits) > maxCounts {
		t.forgetSome()
	}
	for _, l := range a.limits {
		if t.counts[l.key] == nil {
			t.counts[l.key] = &count{}
		}
		t.counts[l.key].running++
	}
	a.running = true
}

// forgetSome makes room for an eighth of the counts: of those that are empty first, then of any.
func (t *throttle) forgetSome() {
	now := time.Now()
	maps.DeleteFunc(t.counts, func(_ countKey, c *count) bool { return c.isEmpty(now) })
	for key, c := range t.counts {
		if len(t.counts) <= maxCounts-maxCounts/8 {
			return
		}
		if c.running == 0 {
			delete(t.counts, key)
		}
	}
}

// charge counts the try against its limits, and ends it.
func (a *attempt) charge() {
	a.finish(func(now time.Time) {
		for _, l := range a.limits {
			c := a.throttle.counts[l.key]
			if c.emptyAt.Before(now) {
				c.emptyAt = now
			}
			c.emptyAt = c.emptyAt.Add(l.interval)
		}
	})
}

// succeed clears the failures of the account from this network, and ends the try. It is for sign-ins.
func (a *attempt) succeed() {
	a.finish(func(time.Time) {
		a.throttle.counts[a.pair].emptyAt = time.Time{}
		a.throttle.rememberPair(a.pair)
	})
}

// end ends an attempt without a verdict. After charge or succeed it does nothing.
func (a *attempt) end() { a.finish(func(time.Time) {}) }

// finish settles and ends the attempt, once, and wakes those that wait for its room.
func (a *attempt) finish(settle func(now time.Time)) {
	if !a.running {
		return
	}
	t := a.throttle
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	settle(now)
	a.running = false
	for _, l := range a.limits {
		c := t.counts[l.key]
		c.running--
		if c.isEmpty(now) {
			delete(t.counts, l.key)
		}
	}
	close(t.ended)
	t.ended = make(chan struct{})
}
