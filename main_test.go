// What shows that the service keeps its contract: a real server over TCP, real SQLite files, a real Redis.
// Sections: harness, main.go, handlers.go, session.go, store.go, faults, fuzzing, benchmarks.

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/x509"
	"database/sql"
	"encoding/json"
	"encoding/pem"
	"errors"
	"expvar"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/gomodule/redigo/redis"
	"golang.org/x/crypto/bcrypt"
)

// ---------------------------------------------------------------------------------------------------
// Harness: finding Redis, running the service, asking it.

const runMainEnv = "SESSION_STORAGE_TEST_RUNS_MAIN" // set: the test binary is a server, the program's or another

func TestMain(m *testing.M) {
	if variant := os.Getenv(runMainEnv); variant == "main" {
		main()
		os.Exit(1) // should main return: or this process would run the tests, and those would start it again
	} else if variant != "" {
		os.Exit(runVariant(variant))
	}
	lastPort.Store(rand.Uint32N(20_000))
	flag.Parse()
	if !flagSet("test.parallel") {
		flag.Set("test.parallel", "16") // most tests wait
	}
	code := m.Run()
	sharedRedis.stop()
	if n := redisSkips.Load(); n > 0 {
		loudly(fmt.Sprintf("!!! %d TESTS SKIPPED FOR WANT OF A REDIS: install redis-server, or set REDIS_URL, or start Docker\n", n))
	}
	os.Exit(code)
}

// loudly prints a line past go test, which shows nothing that a package prints when its tests pass.
func loudly(line string) {
	for _, name := range []string{fmt.Sprintf("/proc/%d/fd/2", os.Getppid()), "/dev/tty"} {
		if f, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND, 0); err == nil {
			defer f.Close()
			if _, err := io.WriteString(f, line); err == nil {
				return
			}
		}
	}
	fmt.Print(line)
}

func flagSet(name string) (set bool) {
	flag.Visit(func(f *flag.Flag) { set = set || f.Name == name })
	return set
}

// skipRedis skips a test that needs a Redis, or fails it where nothing may be skipped.
func skipRedis(t testing.TB, why string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatal("CI is set and there is no Redis: " + why)
	}
	redisSkips.Add(1)
	t.Skip("NO REDIS: " + why)
}

var redisSkips atomic.Int64

// sharedRedis is the Redis of all tests that do not break theirs. Their keys are random, so that they do
// not meet, nor whatever else a Redis named by REDIS_URL holds.
var sharedRedis = shared{stop: func() {}}

type shared struct {
	once sync.Once
	url  string
	why  string // there is none
	stop func()
}

func redisURL(t testing.TB) string {
	t.Helper()
	sharedRedis.once.Do(func() {
		if sharedRedis.url = os.Getenv("REDIS_URL"); sharedRedis.url != "" {
			return
		}
		if _, err := exec.LookPath("redis-server"); err == nil {
			dir, err := os.MkdirTemp("", "session-storage-redis")
			if err != nil {
				t.Fatal(err)
			}
			r := launchRedis(t, dir, freePort(t))
			sharedRedis.url = r.url()
			sharedRedis.stop = func() { r.kill(); os.RemoveAll(dir) }
			return
		}
		if exec.Command("docker", "info").Run() == nil {
			port := freePort(t)
			out, err := exec.Command("docker", "run", "-d", "--rm", "-p", "127.0.0.1:"+port+":6379", "redis:7-alpine").Output()
			if err == nil {
				sharedRedis.url = "redis://127.0.0.1:" + port
				sharedRedis.stop = func() { exec.Command("docker", "kill", strings.TrimSpace(string(out))).Run() }
				return
			}
		}
		sharedRedis.why = "install redis-server, or set REDIS_URL, or start Docker"
	})
	if sharedRedis.why != "" {
		skipRedis(t, sharedRedis.why)
	}
	return sharedRedis.url
}

// redisServer is a Redis of a test's own, which it may break.
type redisServer struct {
	dir, port string
	args      []string
	cmd       *exec.Cmd
}

// ownRedis starts a redis-server with the given options, and stops it at the test's end.
func ownRedis(t testing.TB, args ...string) *redisServer {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		skipRedis(t, "this test breaks its Redis: it needs a redis-server of its own on PATH")
	}
	r := launchRedis(t, t.TempDir(), freePort(t), args...)
	t.Cleanup(r.kill)
	return r
}

func launchRedis(t testing.TB, dir, port string, args ...string) *redisServer {
	r := &redisServer{dir: dir, port: port, args: args}
	r.launch(t)
	return r
}

func (r *redisServer) launch(t testing.TB) {
	t.Helper()
	args := append([]string{"--port", r.port, "--bind", "127.0.0.1", "--save", "", "--dir", r.dir}, r.args...)
	if len(r.args) > 0 && r.args[0] == "--sentinel" {
		args = []string{r.args[1], "--sentinel"}
	}
	r.cmd = exec.Command("redis-server", args...)
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "redis-server listens", func() bool {
		c, err := net.Dial("tcp", "127.0.0.1:"+r.port)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

func (r *redisServer) url() string { return "redis://127.0.0.1:" + r.port }

func (r *redisServer) kill() {
	r.cmd.Process.Kill()
	r.cmd.Wait()
}

// signal sends STOP or CONT.
func (r *redisServer) signal(t testing.TB, name string) {
	t.Helper()
	if err := exec.Command("kill", "-"+name, strconv.Itoa(r.cmd.Process.Pid)).Run(); err != nil {
		t.Fatal(err)
	}
}

// redisDo runs a command on the Redis at url, past the service.
func redisDo(t testing.TB, url, name string, args ...any) any {
	t.Helper()
	c, err := redis.DialURL(url)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	reply, err := c.Do(name, args...)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return reply
}

// freePort returns a port that no other test gets: one that was freed could be another's before it is
// used. It lies below those that the system hands out by itself.
func freePort(t testing.TB) string {
	t.Helper()
	for {
		port := strconv.Itoa(10_000 + int(lastPort.Add(1))%20_000)
		if l, err := net.Listen("tcp", "127.0.0.1:"+port); err == nil {
			l.Close()
			return port
		}
	}
}

var lastPort atomic.Uint32

// eventually waits for a condition in another process, which no channel tells of.
func eventually(t testing.TB, limit time.Duration, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("waited %v in vain: %s", limit, what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// logBuffer is a service's standard error.
type logBuffer struct {
	mu      sync.Mutex
	changed sync.Cond
	text    bytes.Buffer
	ended   bool
}

func newLogBuffer() *logBuffer {
	b := &logBuffer{}
	b.changed.L = &b.mu
	return b
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.changed.Broadcast()
	return b.text.Write(p)
}

func (b *logBuffer) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ended = true
	b.changed.Broadcast()
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// find waits for a line with that message, and returns it.
func (b *logBuffer) find(t testing.TB, msg string) map[string]any {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	late := false
	defer time.AfterFunc(15*time.Second, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		late = true
		b.changed.Broadcast()
	}).Stop()
	for {
		for line := range strings.Lines(b.text.String()) {
			var fields map[string]any
			if json.Unmarshal([]byte(line), &fields) == nil && fields["msg"] == msg {
				return fields
			}
		}
		if b.ended || late {
			t.Fatalf("the service did not log %q:\n%s", msg, b.text.String())
		}
		b.changed.Wait()
	}
}

// service is a running instance of the program.
type service struct {
	testing.TB
	url, dbPath string
	log         *logBuffer
	client      *http.Client
	secrets     []string // that were sent, and must not be logged
	mu          sync.Mutex
	faulty      bool      // its log may hold errors
	stop        func()    // as SIGTERM does; waits for the end
	cmd         *exec.Cmd // when it is a process
}

// environment is the environment of a test's service: a free port, a file of its own, and the given
// variables.
func environment(t testing.TB, vars []string) map[string]string {
	env := map[string]string{"ADDR": "127.0.0.1:0", "DB_PATH": filepath.Join(t.TempDir(), "users.db"),
		"GOMAXPROCS": "as it is", "GOGC": "as it is"}
	for _, v := range vars {
		name, value, _ := strings.Cut(v, "=")
		env[name] = value
	}
	return env
}

// start runs the program within the test, and at its end stops it and looks through its log.
func start(t testing.TB, vars ...string) *service {
	t.Helper()
	env := environment(t, vars)
	s := &service{TB: t, dbPath: env["DB_PATH"], log: newLogBuffer(), client: newClient()}
	ctx, cancel := context.WithCancel(context.Background())
	exited := make(chan int, 1)
	go func() {
		exited <- runCheaply(ctx, func(name string) string { return env[name] }, s.log)
		s.log.end()
	}()
	s.stop = sync.OnceFunc(func() {
		s.client.CloseIdleConnections() // one without a request yet would hold up the end
		cancel()
		if code := <-exited; code != 0 {
			t.Errorf("exit status %d, want 0:\n%s", code, s.log)
		}
		s.checkLog()
	})
	t.Cleanup(s.stop)
	s.url = "http://" + s.log.find(t, "listening")["addr"].(string)
	return s
}

// runCheaply is run with bcrypt at its lowest cost, which no configuration allows, unless the environment
// sets one: the race detector makes bcrypt ten times slower.
func runCheaply(ctx context.Context, getenv func(string) string, stderr io.Writer) int {
	if getenv("BCRYPT_COST") != "" {
		return run(ctx, nil, getenv, io.Discard, stderr)
	}
	cfg, err := loadConfig(getenv)
	if err != nil {
		fmt.Fprintln(stderr, err)
		return 2
	}
	cfg.bcryptCost = bcrypt.MinCost
	log := slog.New(slog.NewJSONHandler(stderr, &slog.HandlerOptions{Level: cfg.logLevel}))
	if err := serve(ctx, cfg, newGate(runtime.NumCPU()), log); err != nil {
		fmt.Fprintln(stderr, err)
		return 1
	}
	return 0
}

func newClient() *http.Client {
	return &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 1000}, Timeout: 30 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// startProcess runs the program as a process of its own, so that it can be killed.
func startProcess(t testing.TB, vars ...string) *service {
	t.Helper()
	return startVariant(t, "cheap", vars...)
}

func startVariant(t testing.TB, variant string, vars ...string) *service {
	t.Helper()
	env := environment(t, vars)
	delete(env, "GOMAXPROCS")
	delete(env, "GOGC")
	s := &service{TB: t, dbPath: env["DB_PATH"], log: newLogBuffer(), client: newClient()}
	s.cmd = exec.Command(os.Args[0])
	if limit := env[limitEnv]; limit != "" {
		s.cmd = exec.Command("sh", "-c", limit+`; exec "$0"`, os.Args[0])
	}
	s.cmd.Env = append(os.Environ(), runMainEnv+"="+variant)
	for name, value := range env {
		s.cmd.Env = append(s.cmd.Env, name+"="+value)
	}
	s.cmd.Stderr = s.log
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- s.cmd.Wait(); s.log.end() }()
	s.stop = sync.OnceFunc(func() {
		s.client.CloseIdleConnections()
		s.cmd.Process.Signal(syscall.SIGTERM) // as docker stop does
		if variant == "bare" || variant == "pooled" {
			s.cmd.Process.Kill()
			s.faulty = true
		}
		if err := <-exited; err != nil && !s.faulty {
			t.Errorf("exit: %v\n%s", err, s.log)
		}
		s.checkLog()
	})
	t.Cleanup(s.stop)
	s.url = "http://" + s.log.find(t, "listening")["addr"].(string)
	return s
}

// checkLog looks for secrets, for lines that are no JSON, and for errors nobody expected.
func (s *service) checkLog() {
	s.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	log := s.log.String()
	for _, secret := range append(s.secrets, "$2a$", "$2b$", "panic", cookieName) {
		if strings.Contains(log, secret) {
			s.Errorf("the log holds %q:\n%s", secret, log)
		}
	}
	for line := range strings.Lines(log) {
		if !json.Valid([]byte(line)) && strings.HasSuffix(line, "\n") {
			s.Errorf("a log line is no JSON: %s", line)
		}
		if strings.Contains(line, `"level":"ERROR"`) && !s.faulty {
			s.Errorf("unexpected error in the log: %s", line)
		}
	}
}

// answer is what the service said.
type reply struct {
	status int
	header http.Header
	body   string
	cookie *http.Cookie // session-id, nil when it was not set
}

// send sends a request, checks what every answer has in common, and returns the answer or what broke it.
func (s *service) send(method, path, body string, header ...string) (*reply, error) {
	s.Helper()
	req, err := http.NewRequest(method, s.url+path, strings.NewReader(body))
	if err != nil {
		s.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for _, h := range header {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Add(name, value)
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	a := &reply{status: resp.StatusCode, header: resp.Header, body: string(text)}
	for _, c := range resp.Cookies() {
		if c.Name == cookieName {
			a.cookie = c
		}
	}
	s.check(method+" "+path, a)
	return a, nil
}

// ask is send for an answer that must come.
func (s *service) ask(method, path, body string, header ...string) *reply {
	s.Helper()
	a, err := s.send(method, path, body, header...)
	if err != nil {
		s.Fatalf("%s %s: %v", method, path, err)
	}
	return a
}

// check is what holds of every answer.
func (s *service) check(what string, a *reply) {
	s.Helper()
	fail := func(format string, args ...any) {
		s.Helper()
		s.Errorf("%s: status %d: %s\n%v\n%s", what, a.status, fmt.Sprintf(format, args...), a.header, a.body)
	}
	if a.header.Get("Cache-Control") != "no-store" || a.header.Get("X-Content-Type-Options") != "nosniff" {
		fail("without no-store or nosniff")
	}
	contentType := "application/json"
	if a.status >= 400 {
		contentType = "application/problem+json"
	} else if a.status == 204 {
		contentType = ""
	}
	if a.header.Get("Content-Type") != contentType {
		fail("content type is not %q", contentType)
	}
	for _, internal := range []string{"$2a$", "$2b$", "password_hash", "passwordHash", "sqlite", "SQL", "redis", "dial", "goroutine", ".go:", "context", "EOF", "127.0.0.1"} {
		if strings.Contains(a.body, internal) {
			fail("tells %q", internal)
		}
	}
	if a.status == 503 && a.header.Get("Retry-After") == "" || a.status == 429 && a.header.Get("Retry-After") == "" {
		fail("without Retry-After")
	}
	if a.status >= 400 && a.body != "" {
		var p struct {
			Title, Detail string
			Status        int
			Errors        map[string]string
		}
		d := json.NewDecoder(strings.NewReader(a.body))
		d.DisallowUnknownFields()
		if err := d.Decode(&p); err != nil || p.Title != http.StatusText(a.status) || p.Status != a.status || p.Detail == "" {
			fail("is no problem of RFC 9457 (%v)", err)
		}
	}
	if a.status >= 400 && a.cookie != nil {
		fail("sets a cookie")
	}
}

const password = "correct horse battery"

var lastEmail atomic.Int64

func newEmail() string { return fmt.Sprintf("user%d@example.com", lastEmail.Add(1)) }

func credentials(email, password string) string {
	text, _ := json.Marshal(map[string]string{"name": "Ada Lovelace", "email": email, "password": password})
	return string(text)
}

func cookie(id string) string { return "Cookie: " + cookieName + "=" + id }

// register makes an account over HTTP and returns its user and session id.
func (s *service) register(email string, header ...string) (User, string) {
	s.Helper()
	a := s.ask("POST", "/user", credentials(email, password), header...)
	if a.status != http.StatusCreated {
		s.Fatalf("POST /user: status %d, want 201: %s", a.status, a.body)
	}
	var created registration
	if err := json.Unmarshal([]byte(a.body), &created); err != nil || a.cookie == nil || a.cookie.Value != created.SessionID {
		s.Fatalf("POST /user: %v, cookie %v, body %s", err, a.cookie, a.body)
	}
	s.secret(created.SessionID, password)
	return created.User, created.SessionID
}

// signIn signs in over HTTP and returns the session id.
func (s *service) signIn(email string, header ...string) string {
	s.Helper()
	a := s.ask("POST", "/user/signin", credentials(email, password), header...)
	if a.status != http.StatusOK || a.cookie == nil {
		s.Fatalf("POST /user/signin: status %d, want 200 and a cookie: %s", a.status, a.body)
	}
	s.secret(a.cookie.Value)
	return a.cookie.Value
}

func (s *service) secret(secrets ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.secrets = append(s.secrets, secrets...)
}

// want asks for the session's user and checks the status.
func (s *service) want(status int, id string) *reply {
	s.Helper()
	a := s.ask("GET", "/user", "", cookie(id))
	if a.status != status {
		s.Errorf("GET /user: status %d, want %d: %s", a.status, status, a.body)
	}
	return a
}

// userJSON is a user as the contract writes one.
func userJSON(u User) string {
	return fmt.Sprintf(`{"id":%q,"name":%q,"email":%q,"createdAt":%q,"updateAt":%q}`, u.ID, u.Name, u.Email, u.CreatedAt, u.UpdatedAt)
}

// addAccount puts an account with a cheap password hash into the database, past the service.
func (s *service) addAccount(email string, cost int) User {
	s.Helper()
	hash, err := bcrypt.GenerateFromPassword([]byte(password), cost)
	if err != nil {
		s.Fatal(err)
	}
	user := User{newUUID(), "Ada Lovelace", email, "2025-03-30T20:00:00.000Z", "2025-03-30T20:00:00.000Z"}
	s.exec(`INSERT INTO users (id, name, email, created_at, updated_at, password_hash) VALUES (?, ?, ?, ?, ?, ?)`,
		user.ID, user.Name, user.Email, user.CreatedAt, user.UpdatedAt, string(hash))
	return user
}

// exec runs SQL on the service's database, past the service.
func (s *service) exec(query string, args ...any) {
	s.Helper()
	db := openSQL(s, s.dbPath)
	defer db.Close()
	if _, err := db.Exec(query, args...); err != nil {
		s.Fatal(err)
	}
}

// count is one number from the service's database.
func (s *service) count(query string, args ...any) (n int) {
	s.Helper()
	db := openSQL(s, s.dbPath)
	defer db.Close()
	if err := db.QueryRow(query, args...).Scan(&n); err != nil {
		s.Fatal(err)
	}
	return n
}

func openSQL(t testing.TB, path string) *sql.DB {
	t.Helper()
	db, err := sql.Open("sqlite", "file:"+path+"?_pragma=busy_timeout(5000)")
	if err != nil {
		t.Fatal(err)
	}
	return db
}

// metric is one of the numbers that DEBUG_ADDR serves.
func (s *service) metric(name string) float64 {
	s.Helper()
	resp, err := s.client.Get("http://" + s.log.find(s, "debug listening")["addr"].(string) + "/debug/vars")
	if err != nil {
		s.Fatal(err)
	}
	defer resp.Body.Close()
	var vars struct{ Service map[string]any }
	if err := json.NewDecoder(resp.Body).Decode(&vars); err != nil {
		s.Fatal(err)
	}
	n, _ := vars.Service[name].(float64)
	return n
}

// each runs a test on the service with either session backend.
func each(t *testing.T, test func(t *testing.T, backend string)) {
	t.Parallel()
	t.Run("sqlite", func(t *testing.T) { t.Parallel(); test(t, "REDIS_URL=") })
	t.Run("redis", func(t *testing.T) { t.Parallel(); test(t, "REDIS_URL="+redisURL(t)) })
}

// together runs n functions at the same moment.
func together(n int, f func(i int)) {
	var wg sync.WaitGroup
	begin := make(chan struct{})
	for i := range n {
		wg.Go(func() { <-begin; f(i) })
	}
	close(begin)
	wg.Wait()
}

// raise sets a maximum that several goroutines look for.
func raise(worst *atomic.Int64, d time.Duration) {
	for old := worst.Load(); int64(d) > old && !worst.CompareAndSwap(old, int64(d)); old = worst.Load() {
	}
}

// ---------------------------------------------------------------------------------------------------
// main.go

func TestWrongConfigurationIsRefused(t *testing.T) {
	for _, tt := range []struct{ name, value, want string }{
		{"ADDR", "8080", "host:port"},
		{"ADDR", ":http-alt", "host:port"},
		{"ADDR", ":65536", "host:port"},
		{"DB_PATH", ":memory:", "path of a file"},
		{"DB_PATH", "file:x?mode=memory", "path of a file"},
		{"REDIS_URL", "localhost:6379", "redis://"},
		{"REDIS_URL", "http://localhost:6379", "redis://"},
		{"REDIS_URL", "redis://localhost", "redis://"},
		{"REDIS_URL", "redis://localhost:6379/zero", "redis://"},
		{"REDIS_URL", "redis://localhost:6379/0?db=1", "redis://"},
		{"REDIS_URL", "redis://a:1,b:2/0", "redis://"},
		{"REDIS_URL", "redis://:1", "redis://"},
		{"REDIS_URL", "redis://:%zz@a:1", "redis://"},
		{"REDIS_URL", "redis-sentinel://a:1,:2/mymaster", "redis://"},
		{"REDIS_URL", "redis-sentinel://a:1,b:2", "primary"},
		{"REDIS_URL", "redis-sentinel://a:1,b/mymaster", "primary"},
		{"SESSION_TTL", "7d", "duration"},
		{"SESSION_TTL", "1500ms", "whole seconds"},
		{"SESSION_TTL", "0s", "1s or more"},
		{"SESSION_TTL", "-1h", "1s or more"},
		{"BCRYPT_COST", "9", "10 to 15"},
		{"BCRYPT_COST", "16", "10 to 15"},
		{"BCRYPT_COST", "twelve", "10 to 15"},
		{"COOKIE_SECURE", "yes", "true or false"},
		{"TRUSTED_PROXIES", "10.0.0.1", "CIDRs"},
		{"TRUSTED_PROXIES", "10.0.0.0/8,proxy", "CIDRs"},
		{"DEBUG_ADDR", "6060", "host:port"},
		{"LOG_LEVEL", "verbose", "debug, info, warn or error"},
		{"LOG_LEVEL", "INFO", "debug, info, warn or error"},
	} {
		var stderr strings.Builder
		code := run(t.Context(), nil, func(name string) string {
			return map[string]string{tt.name: tt.value}[name]
		}, io.Discard, &stderr)
		for _, want := range []string{tt.name, tt.value[:min(4, len(tt.value))], tt.want} {
			if code != 2 || !strings.Contains(stderr.String(), want) {
				t.Errorf("%s=%q: exit status %d, want 2 and %q in: %s", tt.name, tt.value, code, want, &stderr)
			}
		}
	}
}

func TestConfigurationAtItsLimitsIsAccepted(t *testing.T) {
	for _, tt := range []struct{ name, value string }{
		{"ADDR", ":0"}, {"ADDR", "[::1]:65535"}, {"DB_PATH", "/data/my users?#%.db"}, {"SESSION_TTL", "1s"}, {"SESSION_TTL", "87600h0m0s"},
		{"BCRYPT_COST", "10"}, {"BCRYPT_COST", "15"}, {"COOKIE_SECURE", "false"}, {"TRUSTED_PROXIES", " 10.0.0.0/8 , ::1/128"},
		{"REDIS_URL", "redis://h:1"}, {"REDIS_URL", "rediss://u:p%40@[::1]:65535/15"}, {"REDIS_URL", "redis-sentinel://:p@h:1,i:2/n/0"},
	} {
		if _, err := loadConfig(func(name string) string { return map[string]string{tt.name: tt.value}[name] }); err != nil {
			t.Errorf("%s=%q: %v", tt.name, tt.value, err)
		}
	}
}

func TestAllThatIsWrongIsReportedAtOnceAndNoPassword(t *testing.T) {
	for _, url := range []string{
		"redis://user:s3cret@localhost:6379/x", "redis://user:s3c@s3cret@localhost:6379", "redis://:s3cret@localhost",
		"redis:/user:s3cret@localhost:1", "user:s3cret@host", "redis://host:1/?password=s3cret", "redis://h:1#s3cret",
		"redis-sentinel://u:s3cret@a:1,b:2/", "rediss://u:s3cret/s3cret@h:1",
	} {
		var stderr strings.Builder
		env := map[string]string{"REDIS_URL": url, "BCRYPT_COST": "1", "LOG_LEVEL": "loud"}
		code := run(t.Context(), nil, func(name string) string { return env[name] }, io.Discard, &stderr)
		message := stderr.String()
		if code != 2 || strings.Contains(message, "s3c") || !strings.Contains(message, "REDIS_URL") ||
			!strings.Contains(message, "BCRYPT_COST") || !strings.Contains(message, "LOG_LEVEL") {
			t.Errorf("%s: exit status %d, message: %s", url, code, message)
		}
	}
}

func TestConfigurationDefaults(t *testing.T) {
	cfg, err := loadConfig(func(string) string { return "" })
	if err != nil || cfg.addr != ":8080" || cfg.dbPath != "users.db" || cfg.redis != nil || cfg.sessionTTL != 7*24*time.Hour ||
		cfg.bcryptCost != 12 || !cfg.cookieSecure || cfg.trustedProxies != nil || cfg.debugAddr != "" || cfg.logLevel != slog.LevelInfo {
		t.Errorf("got %+v, %v", cfg, err)
	}
}

func TestLogLevels(t *testing.T) {
	t.Parallel()
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for name, tt := range map[string]struct {
		level slog.Level
		seen  string
	}{
		"debug": {slog.LevelDebug, "ERROR INFO WARN"},
		"info":  {slog.LevelInfo, "ERROR INFO WARN"},
		"warn":  {slog.LevelWarn, "ERROR WARN"},
		"error": {slog.LevelError, "ERROR"},
	} {
		env := environment(t, []string{"LOG_LEVEL=" + name, "COOKIE_SECURE=false", "REDIS_URL=redis://127.0.0.1:" + freePort(t)})
		getenv := func(variable string) string { return env[variable] }
		if cfg, err := loadConfig(getenv); err != nil || cfg.logLevel != tt.level {
			t.Errorf("LOG_LEVEL=%s: %v, %v, want %v", name, cfg.logLevel, err, tt.level)
		}
		var stderr bytes.Buffer
		if status := run(ended, nil, getenv, io.Discard, &stderr); status != 0 { // starts and stops at once
			t.Errorf("LOG_LEVEL=%s: status %d: %s", name, status, &stderr)
		}
		var levels []string
		for _, level := range regexp.MustCompile(`"level":"(\w+)"`).FindAllStringSubmatch(stderr.String(), -1) {
			levels = append(levels, level[1])
		}
		slices.Sort(levels)
		if seen := strings.Join(slices.Compact(levels), " "); seen != tt.seen {
			t.Errorf("LOG_LEVEL=%s: logs %s, want %s", name, seen, tt.seen)
		}
	}
}

func TestTheRuntimeIsTunedUnlessTheEnvironmentSays(t *testing.T) {
	cores, percent := runtime.GOMAXPROCS(0), debug.SetGCPercent(100)
	t.Cleanup(func() { runtime.GOMAXPROCS(cores); debug.SetGCPercent(percent) })
	for _, tt := range []struct {
		env            map[string]string
		procs, percent int
	}{{map[string]string{"GOGC": "100", "GOMAXPROCS": "2"}, cores, 100}, {nil, 3 * cores, 400}} {
		tuneRuntime(func(name string) string { return tt.env[name] })
		if procs, percent := runtime.GOMAXPROCS(0), debug.SetGCPercent(100); procs != tt.procs || percent != tt.percent {
			t.Errorf("with %v: GOMAXPROCS %d, GOGC %d, want %d and %d", tt.env, procs, percent, tt.procs, tt.percent)
		}
	}
}

func TestFlags(t *testing.T) {
	for _, tt := range []struct {
		args           []string
		code           int
		stdout, stderr string
	}{
		{[]string{"-version"}, 0, runtime.Version(), ""},
		{[]string{"--version"}, 0, runtime.Version(), ""},
		{[]string{"-help"}, 2, "", "healthcheck"},
		{[]string{"-port", "1"}, 2, "", "environment"},
		{[]string{"serve"}, 2, "", "environment"},
	} {
		var stdout, stderr strings.Builder
		broken := func(string) string { return "broken" } // so that it cannot serve
		code := run(t.Context(), tt.args, broken, &stdout, &stderr)
		if code != tt.code || !strings.Contains(stdout.String(), tt.stdout) || !strings.Contains(stderr.String(), tt.stderr) {
			t.Errorf("%q: exit status %d, want %d; stdout %s; stderr %s", tt.args, code, tt.code, &stdout, &stderr)
		}
	}
}

func TestHealthcheck(t *testing.T) {
	t.Parallel()
	s := start(t)
	check := func(addr string) int {
		return run(t.Context(), []string{"-healthcheck"}, func(name string) string { return map[string]string{"ADDR": addr}[name] }, io.Discard, io.Discard)
	}
	addr := strings.TrimPrefix(s.url, "http://")
	_, port, _ := net.SplitHostPort(addr)
	for _, addr := range []string{addr, ":" + port, "0.0.0.0:" + port} {
		if code := check(addr); code != 0 {
			t.Errorf("of a service that is well, by ADDR=%s: exit status %d, want 0", addr, code)
		}
	}
	if code := check("127.0.0.1:" + freePort(t)); code != 1 {
		t.Errorf("of no service: exit status %d, want 1", code)
	}
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	if code := check(silent.Addr().String()); code != 1 {
		t.Errorf("of a service that does not answer: exit status %d, want 1", code)
	}
}

func TestStartFailsWithStatus1(t *testing.T) {
	t.Parallel()
	s := start(t)
	for _, tt := range []struct{ name, value string }{
		{"ADDR", strings.TrimPrefix(s.url, "http://")},
		{"DEBUG_ADDR", strings.TrimPrefix(s.url, "http://")},
		{"DB_PATH", filepath.Join(t.TempDir(), "no", "such", "folder", "users.db")},
		{"DB_PATH", t.TempDir()},
	} {
		var stderr strings.Builder
		env := environment(t, []string{tt.name + "=" + tt.value})
		code := run(t.Context(), nil, func(name string) string { return env[name] }, io.Discard, &stderr)
		if code != 1 || !strings.Contains(stderr.String(), tt.name) {
			t.Errorf("%s=%s: exit status %d, want 1 and its name in: %s", tt.name, tt.value, code, &stderr)
		}
	}
}

func TestShutdownFinishesWhatRuns(t *testing.T) {
	t.Parallel()
	s := start(t)
	c, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	body := credentials(newEmail(), password)
	fmt.Fprintf(c, "POST /user HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n", len(body))
	answers := bufio.NewReader(c)
	if line, err := answers.ReadString('\n'); err != nil || !strings.Contains(line, "100") {
		t.Fatalf("got %q, %v: the handler does not read", line, err)
	}
	answers.ReadString('\n')
	stopped := make(chan struct{})
	go func() { s.stop(); close(stopped) }()
	s.log.find(t, "shutting down")
	io.WriteString(c, body)
	resp, err := http.ReadResponse(answers, nil)
	if err != nil || resp.StatusCode != http.StatusCreated || !resp.Close {
		t.Fatalf("the request that ran: %+v, %v, want 201 and Connection: close", resp, err)
	}
	<-stopped
	if _, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://")); err == nil {
		t.Error("a stopped service takes connections")
	}
	s.log.find(t, "stopped")
}

func TestDebugAddressIsTheOnlyOneThatServesDebug(t *testing.T) {
	t.Parallel()
	s := startProcess(t, "DEBUG_ADDR=127.0.0.1:0", "COOKIE_SECURE=false", "REDIS_URL="+redisURL(t))
	s.secrets = nil
	_, id := s.register(newEmail())
	s.want(200, id)
	s.ask("GET", "/nowhere", "")
	for name, want := range map[string]float64{"GET /user 200": 1, "POST /user 201": 1, "/ 404": 1, "registered": 1, "bcryptBusy": 0, "sessionBatches": 1, "sessionLookups": 1} {
		if got := s.metric(name); got < want {
			t.Errorf("%s is %v, want %v or more", name, got, want)
		}
	}
	for _, path := range []string{"/debug/vars", "/debug/pprof/", "/debug/pprof/cmdline"} {
		if a := s.ask("GET", path, ""); a.status != http.StatusNotFound {
			t.Errorf("%s on the public address: status %d, want 404", path, a.status)
		}
		resp, err := http.Get("http://" + s.log.find(t, "debug listening")["addr"].(string) + path)
		if err != nil {
			t.Fatal(err)
		}
		if resp.Body.Close(); resp.StatusCode != http.StatusOK {
			t.Errorf("%s on the debug address: status %d", path, resp.StatusCode)
		}
	}
	s.log.find(t, "COOKIE_SECURE=false: session cookies travel over plain HTTP, where anybody on the way can read them")
	if strings.Contains(s.log.String(), "not a loopback") {
		t.Error("warns of a loopback address")
	}
	other := startProcess(t, "DEBUG_ADDR=0.0.0.0:0")
	other.log.find(t, "DEBUG_ADDR is not a loopback address: whoever reaches it can profile this process")
}

func TestStartSaysWhatIsInUse(t *testing.T) {
	t.Parallel()
	url := redisURL(t)
	s := start(t, "REDIS_URL="+strings.Replace(url, "redis://", "redis://:wr0ng@", 1))
	s.faulty = true // a Redis without a password refuses one
	line := s.log.find(t, "listening")
	if line["accounts"] != s.dbPath || line["sessions"] != strings.Replace(url, "redis://", "redis://…", 1) || line["version"] == "" {
		t.Errorf("got %v", line)
	}
	if strings.Contains(s.log.String(), "wr0ng") {
		t.Error("logs the password of Redis")
	}
	if line := start(t).log.find(t, "listening"); !strings.HasPrefix(line["sessions"].(string), "sqlite ") {
		t.Errorf("got %v", line)
	}
}

// ---------------------------------------------------------------------------------------------------
// handlers.go

func TestTheWholeStory(t *testing.T) {
	each(t, func(t *testing.T, backend string) {
		s := start(t, backend)
		before := time.Now().UTC().Format(timeFormat)
		a := s.ask("POST", "/user", `{"name":" Ada Lovelace ","email":" Ada@Example.COM ","password":"correct horse","role":["admin"],"n":1e999}`, "Content-Type: application/json; charset=utf-8")
		s.secret("correct horse")
		var created registration
		json.Unmarshal([]byte(a.body), &created)
		u := created.User
		if a.status != 201 || a.body != fmt.Sprintf(`{"user":%s,"sessionId":%q}`, userJSON(u), created.SessionID) {
			t.Fatalf("POST /user: status %d: %s", a.status, a.body)
		}
		if u.Name != "Ada Lovelace" || u.Email != "ada@example.com" || u.CreatedAt != u.UpdatedAt || u.CreatedAt < before ||
			!regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$`).MatchString(u.CreatedAt) {
			t.Errorf("user is %+v", u)
		}
		if !regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`).MatchString(created.SessionID) {
			t.Errorf("session id %q is no version 4 UUID", created.SessionID)
		}
		if got, want := a.header.Get("Set-Cookie"), "session-id="+created.SessionID+"; Path=/; Max-Age=604800; HttpOnly; Secure; SameSite=Lax"; got != want {
			t.Errorf("Set-Cookie: %s, want %s", got, want)
		}
		if a := s.want(200, created.SessionID); a.body != userJSON(u) || a.cookie != nil {
			t.Errorf("GET /user: %s, want %s and no cookie", a.body, userJSON(u))
		}
		if a := s.ask("HEAD", "/user", "", cookie(created.SessionID)); a.status != 200 || a.body != "" {
			t.Errorf("HEAD /user: status %d, body %q", a.status, a.body)
		}
		a = s.ask("POST", "/user/signin", `{"email":"ADA@example.com ","password":"correct horse"}`)
		if a.status != 200 || a.body != userJSON(u) || a.cookie == nil || a.cookie.Value == created.SessionID {
			t.Fatalf("POST /user/signin: status %d, cookie %v: %s", a.status, a.cookie, a.body)
		}
		second := a.cookie.Value
		s.want(200, created.SessionID) // signing in elsewhere does not end other sessions
		for range 2 {                  // signing out cannot fail because it was done
			a = s.ask("DELETE", "/user/session", "", cookie(second))
			if got, want := a.header.Get("Set-Cookie"), "session-id=; Path=/; Max-Age=0; HttpOnly; Secure; SameSite=Lax"; a.status != 204 || a.body != "" || got != want {
				t.Errorf("DELETE /user/session: status %d, body %q, Set-Cookie: %s", a.status, a.body, got)
			}
		}
		s.want(401, second)
		s.want(200, created.SessionID)
		for range 2 {
			if a := s.ask("DELETE", "/user/session", ""); a.status != 204 {
				t.Errorf("DELETE /user/session without a cookie: status %d, want 204", a.status)
			}
		}
		if a := s.ask("GET", "/healthz", ""); a.status != 200 || a.body != `{"status":"ok"}` {
			t.Errorf("GET /healthz: status %d: %s", a.status, a.body)
		}
		for _, msg := range []string{"registered", "signed in", "signed out"} {
			if line := s.log.find(t, msg); line["client"] != "127.0.0.1" || msg != "signed out" && line["user"] != u.ID {
				t.Errorf("log line %v", line)
			}
		}
	})
}

func TestBodiesThatAreRefused(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.register("taken@example.com")
	const good = `"name":"Ada","email":"free@example.com","password":"correct horse"`
	for _, tt := range []struct {
		what, body string
		header     string
		status     int
		fields     string // of errors
	}{
		{"no content type", `{` + good + `}`, "Content-Type: ", 415, ""},
		{"a form", `{` + good + `}`, "Content-Type: application/x-www-form-urlencoded", 415, ""},
		{"text", `{` + good + `}`, "Content-Type: text/plain", 415, ""},
		{"nothing", ` `, "", 400, ""},
		{"not JSON", `{name:1}`, "", 400, ""},
		{"half of it", `{` + good, "", 400, ""},
		{"an array", `[{` + good + `}]`, "", 400, ""},
		{"null", `null`, "", 400, ""},
		{"a string", `"` + `x"`, "", 400, ""},
		{"two objects", `{` + good + `}{}`, "", 400, ""},
		{"trailing text", `{` + good + `} x`, "", 400, ""},
		{"a byte order mark", "\ufeff{" + good + `}`, "", 400, ""},
		{"invalid UTF-8", `{` + good + ",\"x\":\"\xff\"}", "", 400, ""},
		{"deep nesting", `{"x":` + strings.Repeat("[", 8000) + strings.Repeat("]", 8000) + `}`, "", 400, "email name password"},
		{"no fields", `{}`, "", 400, "email name password"},
		{"nulls", `{"name":null,"email":null,"password":null}`, "", 400, "email name password"},
		{"wrong types", `{"name":1,"email":["a@b"],"password":{}}`, "", 400, "email name password"},
		{"keys in another case", `{"Name":"Ada","EMAIL":"a@b","Password":"correct horse"}`, "", 400, "email name password"},
		{"one wrong of three", `{"name":"Ada","email":"a@b","password":"short"}`, "", 400, "password"},
		{"a blank name", `{"name":" \t ","email":"a@b","password":"correct horse"}`, "", 400, "name"},
		{"a name of 101 characters", `{"name":"` + strings.Repeat("é", 101) + `","email":"a@b","password":"correct horse"}`, "", 400, "name"},
		{"a name with a newline", `{"name":"A\nB","email":"a@b","password":"correct horse"}`, "", 400, "name"},
		{"a name with C1", `{"name":"A\u0085B","email":"a@b","password":"correct horse"}`, "", 400, "name"},
		{"no at", `{"name":"Ada","email":"ada","password":"correct horse"}`, "", 400, "email"},
		{"a display name", `{"name":"Ada","email":"Ada <a@b>","password":"correct horse"}`, "", 400, "email"},
		{"two addresses", `{"name":"Ada","email":"a@b,c@d","password":"correct horse"}`, "", 400, "email"},
		{"an address with a line break", `{"name":"Ada","email":"a@b\r\nBcc: c@d","password":"correct horse"}`, "", 400, "email"},
		{"an address of 255 bytes", `{"name":"Ada","email":"` + strings.Repeat("a", 243) + `@example.com","password":"correct horse"}`, "", 400, "email"},
		{"a password of 7 bytes", `{"name":"Ada","email":"a@b","password":"1234567"}`, "", 400, "password"},
		{"a password of 73 bytes", `{"name":"Ada","email":"a@b","password":"` + strings.Repeat("p", 73) + `"}`, "", 400, "password"},
		{"a password with NUL", `{"name":"Ada","email":"a@b","password":"correct\u0000horse"}`, "", 400, "password"},
		{"16 KiB and a byte", `{` + good + `,"x":"` + strings.Repeat("x", maxBody-len(good)-8+1) + `"}`, "", 413, ""},
		{"an email that is taken", credentials("taken@example.com", "another password"), "", 409, ""},
		{"an email that is taken, in capitals", credentials(" TAKEN@example.com", "another password"), "", 409, ""},
	} {
		req, _ := http.NewRequest("POST", s.url+"/user", strings.NewReader(tt.body))
		req.Header.Set("Content-Type", "application/json")
		if _, contentType, set := strings.Cut(tt.header, ": "); set {
			req.Header.Set("Content-Type", contentType)
		}
		resp, err := s.client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		s.check("POST /user "+tt.what, &reply{status: resp.StatusCode, header: resp.Header, body: string(text)})
		var p problem
		json.Unmarshal(text, &p)
		if got := strings.Join(slices.Sorted(maps.Keys(p.Errors)), " "); resp.StatusCode != tt.status || got != tt.fields {
			t.Errorf("POST /user %s: status %d, errors of %q, want %d and %q: %s", tt.what, resp.StatusCode, got, tt.status, tt.fields, text)
		}
	}
	if n := s.count(`SELECT count(*) FROM users`); n != 1 {
		t.Errorf("%d accounts, want the first one only", n)
	}
}

func TestBodiesThatAreAccepted(t *testing.T) {
	t.Parallel()
	s := start(t)
	exactly16KiB := `{"name":"Ada","email":"big@example.com","password":"correct horse","x":"`
	exactly16KiB += strings.Repeat("x", maxBody-len(exactly16KiB)-2) + `"}`
	for _, body := range []string{
		exactly16KiB,
		`{"name":"` + strings.Repeat("é", 100) + `","email":"a@b","password":"` + strings.Repeat("p", 72) + `"}`,
		`{"name":"<b>&\"\\","email":"` + strings.Repeat("a", 242) + `@example.com","password":"        "}`,
		` {"name":"李","email":"o'brien+tag@sub.example.com","password":"pässwörd"} ` + "\n",
	} {
		if a := s.ask("POST", "/user", body); a.status != 201 {
			t.Errorf("POST /user %.60s…: status %d, want 201: %s", body, a.status, a.body)
		}
	}
	for _, tt := range []struct {
		body   string
		status int
	}{
		{`{"email":"a@b","password":"` + strings.Repeat("p", 72) + `"}`, 200},
		{`{"email":"a@b","password":"` + strings.Repeat("p", 73) + `"}`, 401}, // bcrypt would accept it
		{`{"email":"a@b","password":""}`, 401},
		{`{"email":"","password":"p"}`, 401},
		{`{"email":"o'brien+tag@sub.example.com","password":"pässwörd\u0000pässwörd"}`, 401}, // bcrypt would accept it
		{`{"email":"a@b"}`, 400},
		{`{"password":"x"}`, 400},
		{`{"email":1,"password":"x"}`, 400},
	} {
		if a := s.ask("POST", "/user/signin", tt.body); a.status != tt.status {
			t.Errorf("POST /user/signin %.60s…: status %d, want %d: %s", tt.body, a.status, tt.status, a.body)
		}
	}
}

func TestAnEmailRegistersOnce(t *testing.T) {
	each(t, func(t *testing.T, backend string) {
		s := start(t, backend)
		email := newEmail()
		var created, taken atomic.Int64
		together(8, func(int) {
			switch a := s.ask("POST", "/user", credentials(email, password)); a.status {
			case 201:
				created.Add(1)
			case 409:
				taken.Add(1)
			default:
				t.Errorf("POST /user: status %d: %s", a.status, a.body)
			}
		})
		if created.Load() != 1 || taken.Load() != 7 || s.count(`SELECT count(*) FROM users`) != 1 {
			t.Errorf("%d times 201 and %d times 409, want 1 and 7", created.Load(), taken.Load())
		}
		if backend == "REDIS_URL=" {
			if n := s.count(`SELECT count(*) FROM sessions`); n != 1 {
				t.Errorf("%d sessions, want 1: those who lost leave none behind", n)
			}
		}
	})
}

func TestSigningInReplacesTheSessionOfTheCookie(t *testing.T) {
	each(t, func(t *testing.T, backend string) {
		s := start(t, backend)
		email := newEmail()
		_, first := s.register(email)
		second := s.signIn(email, cookie(first))
		s.want(401, first)
		s.want(200, second)
		_, third := s.register(newEmail(), cookie(second))
		s.want(401, second)
		s.want(200, third)
		fixed := "11111111-1111-4111-8111-111111111111"
		if id := s.signIn(email, cookie(fixed)); id == fixed {
			t.Error("signing in takes the session id that the client chose")
		}
		s.want(401, fixed)
		if a := s.ask("POST", "/user/signin", credentials(email, "wrong password"), cookie(third)); a.status != 401 {
			t.Errorf("status %d, want 401", a.status)
		}
		s.want(200, third) // a sign-in that failed ends nothing
	})
}

func TestCookies(t *testing.T) {
	t.Parallel()
	s := startProcess(t, "COOKIE_SECURE=false", "SESSION_TTL=90s", "DEBUG_ADDR=127.0.0.1:0", "REDIS_URL="+redisURL(t))
	_, id := s.register(newEmail())
	a := s.ask("DELETE", "/user/session", "", cookie(id))
	if got, want := a.header.Get("Set-Cookie"), "session-id=; Path=/; Max-Age=0; HttpOnly; SameSite=Lax"; got != want {
		t.Errorf("Set-Cookie: %s, want %s", got, want)
	}
	if a := s.ask("POST", "/user", credentials(newEmail(), password)); !strings.HasSuffix(a.header.Get("Set-Cookie"), "; Path=/; Max-Age=90; HttpOnly; SameSite=Lax") {
		t.Errorf("Set-Cookie: %s", a.header.Get("Set-Cookie"))
	}
	batches := s.metric("sessionBatches")
	for _, value := range []string{"", "x", "*", id[:35], id + "0", "{" + id[1:], strings.Replace(id, "-", "0", 1), strings.Repeat("a", 8000), "../../etc/passwd", id[:35] + "g", `"` + id} {
		s.want(401, value)
		if a := s.ask("DELETE", "/user/session", "", cookie(value)); a.status != 204 {
			t.Errorf("DELETE /user/session: status %d, want 204", a.status)
		}
	}
	if now := s.metric("sessionBatches"); now != batches {
		t.Errorf("cookies that are no UUID reached the store %v times", now-batches)
	}
}

func TestRoutes(t *testing.T) {
	t.Parallel()
	s := start(t)
	for _, tt := range []struct {
		method, path, allow string
		status              int
	}{
		{"GET", "/", "", 404}, {"POST", "/", "", 404}, {"GET", "/users", "", 404}, {"GET", "/user/", "", 404}, {"GET", "//user", "", 404},
		{"GET", "/user/../healthz", "", 404}, {"GET", "/user/session/x", "", 404}, {"CONNECT", "/x", "", 404},
		{"PUT", "/user", "GET, HEAD, POST", 405}, {"DELETE", "/user", "GET, HEAD, POST", 405}, {"OPTIONS", "/user", "GET, HEAD, POST", 405},
		{"GET", "/user/signin", "POST", 405}, {"GET", "/user/session", "DELETE", 405}, {"HEAD", "/user/session", "DELETE", 405},
		{"POST", "/healthz", "GET, HEAD", 405}, {"BREW", "/healthz", "GET, HEAD", 405}, {"HEAD", "/healthz", "", 200}, {"HEAD", "/user", "", 401},
	} {
		a := s.ask(tt.method, tt.path, "")
		if a.status != tt.status || a.header.Get("Allow") != tt.allow {
			t.Errorf("%s %s: status %d, Allow %q, want %d, %q", tt.method, tt.path, a.status, a.header.Get("Allow"), tt.status, tt.allow)
		}
	}
	for _, line := range []string{"OPTIONS * HTTP/1.1", "GET http://x HTTP/1.1", "CONNECT x:1 HTTP/1.1"} {
		status, header, body := s.raw(line + "\r\nHost: x\r\nConnection: close\r\n\r\n")
		if status != 404 {
			t.Errorf("%s: status %d, want 404", line, status)
		}
		s.check(line, &reply{status: status, header: header, body: body})
	}
}

// raw sends bytes and reads one answer; status 0 when the connection was closed without one.
func (s *service) raw(text string) (status int, header http.Header, body string) {
	s.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		s.Fatal(err)
	}
	defer c.Close()
	go io.WriteString(c, text) // it may be answered before it is read whole
	c.SetReadDeadline(time.Now().Add(20 * time.Second))
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return 0, nil, ""
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, resp.Header, string(b)
}

func TestBrowsersOnOtherSitesAreRefused(t *testing.T) {
	t.Parallel()
	s := start(t)
	_, id := s.register(newEmail())
	for _, tt := range []struct {
		header []string
		status int
	}{
		{[]string{"Sec-Fetch-Site: cross-site"}, 403},
		{[]string{"Sec-Fetch-Site: same-site"}, 403},
		{[]string{"Origin: https://evil.example"}, 403},
		{[]string{"Origin: null"}, 403},
		{[]string{"Sec-Fetch-Site: same-origin"}, 204},
		{[]string{"Origin: " + s.url}, 204},
		{nil, 204}, // curl
	} {
		for _, route := range []string{"POST /user", "POST /user/signin", "DELETE /user/session"} {
			method, path, _ := strings.Cut(route, " ")
			if a := s.ask(method, path, "", append(tt.header, cookie(id))...); (a.status == 403) != (tt.status == 403) {
				t.Errorf("%s %q: status %d, want 403: %v", route, tt.header, a.status, tt.status == 403)
			}
		}
	}
	_, id = s.register(newEmail())
	if a := s.ask("GET", "/user", "", "Sec-Fetch-Site: cross-site", cookie(id)); a.status != 200 {
		t.Errorf("GET from another site: status %d, want 200: reading is safe", a.status)
	}
}

func TestUnknownEmailAndWrongPasswordAreAlike(t *testing.T) {
	t.Parallel()
	s := startProcess(t, "DEBUG_ADDR=127.0.0.1:0", "BCRYPT_COST=10")
	for cost := bcrypt.MinCost; cost <= 10; cost += 3 {
		s.addAccount(fmt.Sprintf("cost%d@example.com", cost), cost)
	}
	rounds := func(body string) (work float64, answer string) {
		before := s.metric("bcryptRounds")
		a := s.ask("POST", "/user/signin", body)
		if a.status != 401 || a.cookie != nil {
			t.Errorf("POST /user/signin: status %d, want 401", a.status)
		}
		return s.metric("bcryptRounds") - before, a.body
	}
	for _, body := range []string{
		credentials("unknown@example.com", "wrong password"),
		credentials("cost10@example.com", "wrong password"),
		credentials("cost7@example.com", "wrong password"), // of a hash that is weaker than configured
		credentials("cost4@example.com", "wrong password"),
		credentials("cost10@example.com", "short"),
		credentials("unknown@example.com", "short"),
		credentials("no address", "wrong password"),
	} {
		if work, answer := rounds(body); work != 1<<10 || answer != `{"title":"Unauthorized","status":401,"detail":"The email or the password is wrong."}` {
			t.Errorf("POST /user/signin %s: %v rounds of bcrypt, want %v: %s", body, work, 1<<10, answer)
		}
	}
}

func TestOldHashesAreAcceptedAndUpgraded(t *testing.T) {
	t.Parallel()
	s := start(t, "BCRYPT_COST=10")
	for _, prefix := range []string{"$2a$", "$2b$"} {
		user := s.addAccount(newEmail(), bcrypt.MinCost)
		s.exec(`UPDATE users SET password_hash = ? || substr(password_hash, 5) WHERE id = ?`, prefix, user.ID)
		s.signIn(user.Email)
		var upgraded string
		db := openSQL(t, s.dbPath)
		db.QueryRow(`SELECT password_hash FROM users WHERE id = ?`, user.ID).Scan(&upgraded)
		db.Close()
		if !strings.HasPrefix(upgraded, "$2a$10$") {
			t.Errorf("a hash of %s at cost 4 is not stored anew at cost 10: %q", prefix, upgraded)
		}
		s.signIn(user.Email)
		if n := s.count(`SELECT count(*) FROM users WHERE id = ? AND password_hash = ?`, user.ID, upgraded); n != 1 {
			t.Errorf("a hash at the configured cost was stored anew")
		}
	}
	user := s.addAccount(newEmail(), 11)
	s.signIn(user.Email)
	if n := s.count(`SELECT count(*) FROM users WHERE id = ? AND password_hash LIKE '$2a$11$%'`, user.ID); n != 1 {
		t.Error("a hash that is stronger than configured was replaced")
	}
}

func TestAHashThatIsNoneIsAFaultOfOurs(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.faulty = true
	user := s.addAccount(newEmail(), bcrypt.MinCost)
	s.exec(`UPDATE users SET password_hash = 'plain' WHERE id = ?`, user.ID)
	if a := s.ask("POST", "/user/signin", credentials(user.Email, password)); a.status != 500 {
		t.Errorf("status %d, want 500", a.status)
	}
	if line := s.log.find(t, "request failed"); !strings.Contains(line["err"].(string), user.ID) {
		t.Errorf("log line %v, want the user's id", line)
	}
}

func TestFailedSignInsAreThrottled(t *testing.T) {
	t.Parallel()
	s := startProcess(t, "DEBUG_ADDR=127.0.0.1:0", "TRUSTED_PROXIES=127.0.0.0/8")
	email := newEmail()
	user := s.addAccount(email, bcrypt.MinCost)
	open := s.signIn(email)
	guess := func(from string) *reply {
		return s.ask("POST", "/user/signin", credentials(email, "wrong password"), "X-Forwarded-For: "+from)
	}
	for i := range 10 {
		if a := guess("192.0.2.1"); a.status != 401 {
			t.Fatalf("guess %d: status %d, want 401", i+1, a.status)
		}
	}
	comparisons := s.metric("bcryptRounds")
	for range 3 {
		a := guess("192.0.2.1")
		if seconds, _ := strconv.Atoi(a.header.Get("Retry-After")); a.status != 429 || seconds < 1 || seconds > 60 {
			t.Errorf("guess 11: status %d, Retry-After %q, want 429 and at most a minute", a.status, a.header.Get("Retry-After"))
		}
	}
	if a := s.ask("POST", "/user/signin", credentials(email, password), "X-Forwarded-For: 192.0.2.1"); a.status != 429 {
		t.Errorf("the right password from there: status %d, want 429", a.status)
	}
	if s.metric("bcryptRounds") != comparisons {
		t.Error("a try that was refused cost a bcrypt")
	}
	s.want(200, open) // the victim's open session
	s.signIn(email, "X-Forwarded-For: 192.0.2.2")
	if a := s.ask("POST", "/user/signin", credentials(newEmail(), "wrong password"), "X-Forwarded-For: 192.0.2.1"); a.status != 401 {
		t.Errorf("another email from there: status %d, want 401", a.status)
	}
	for event, want := range map[string]float64{"signed in": 2, "sign-in refused": 11, "sign-in throttled": 4} {
		if n := s.metric(event); n != want {
			t.Errorf("%s: counted %v times, want %v", event, n, want)
		}
	}
	if line := s.log.find(t, "sign-in throttled"); line["client"] != "192.0.2.1" {
		t.Errorf("log line %v", line)
	}
	if line := s.log.find(t, "sign-in refused"); line["user"] != user.ID || line["client"] != "192.0.2.1" {
		t.Errorf("log line %v", line)
	}
}

func TestThrottle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		th := &throttle{emptyAt: map[string]time.Duration{}}
		client := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}) }
		fail := func(email string, i int) bool { return th.add(email, client(i), 1) == nil }
		for range 10 {
			if !fail("a", 1) {
				t.Fatal("refused before 10 failures")
			}
		}
		if p, _ := errors.AsType[*problem](th.add("a", client(1), 0)); fail("a", 1) || p == nil || p.retryAfter <= 0 || p.retryAfter > time.Minute {
			t.Errorf("the 11th may be made, or after more than a minute: %v", p)
		}
		time.Sleep(time.Minute) // a place frees up, one a minute
		if !fail("a", 1) || fail("a", 1) {
			t.Error("not one place after a minute")
		}
		if !fail("a", 2) || !fail("b", 1) {
			t.Error("another address or another email is refused")
		}
		th.add("a", client(2), -1)
		time.Sleep(time.Minute)
		if !fail("a", 1) {
			t.Fatal("no place after another minute")
		}
		th.add("a", client(1), -1) // it was a success: the count starts anew
		for i := range 10 {
			if !fail("a", 1) {
				t.Errorf("refused at failure %d after a success", i+1)
			}
		}
		n := 0 // from anywhere: 100, then ten a minute
		for ; fail("c", n); n++ {
		}
		if n != 100 {
			t.Errorf("%d failures from anywhere, want 100", n)
		}
		time.Sleep(time.Minute)
		for n = 0; fail("c", 1000+n); n++ {
		}
		if n != 10 {
			t.Errorf("%d places a minute from anywhere, want 10", n)
		}
	})
}

func TestThrottleForgetsWhatItNeedNotKnow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		th := &throttle{emptyAt: map[string]time.Duration{}}
		largest := 0
		for i := range 200_000 { // a hundred tries a second, more than any machine's bcrypt allows
			th.add(strconv.Itoa(i), netip.IPv6Loopback(), 1)
			time.Sleep(10 * time.Millisecond)
			largest = max(largest, len(th.emptyAt))
		}
		if largest > 20_000 {
			t.Errorf("it remembered %d counts at once", largest)
		}
	})
}

func TestClientAddress(t *testing.T) {
	for _, tt := range []struct {
		proxies, peer string
		forwarded     []string
		want          string
	}{
		{"", "192.0.2.1:5", nil, "192.0.2.1"},
		{"", "192.0.2.1:5", []string{"198.51.100.7"}, "192.0.2.1"}, // nobody is trusted
		{"10.0.0.0/8", "192.0.2.1:5", []string{"198.51.100.7"}, "192.0.2.1"},
		{"10.0.0.0/8", "10.1.2.3:5", nil, "10.1.2.3"},
		{"10.0.0.0/8", "10.1.2.3:5", []string{"198.51.100.7"}, "198.51.100.7"},
		{"10.0.0.0/8", "[::ffff:10.1.2.3]:5", []string{"::ffff:198.51.100.7"}, "198.51.100.7"},
		{"10.0.0.0/8", "10.1.2.3:5", []string{"203.0.113.9, 198.51.100.7"}, "198.51.100.7"},   // what the client claims is further left
		{"10.0.0.0/8", "10.1.2.3:5", []string{"203.0.113.9", "198.51.100.7"}, "198.51.100.7"}, // in two header lines
		{"10.0.0.0/8, fd00::/8", "10.1.2.3:5", []string{"203.0.113.9,2001:db8::1, fd00::1,10.9.9.9"}, "2001:db8::1"},
		{"10.0.0.0/8", "10.1.2.3:5", []string{"10.2.2.2,10.3.3.3"}, "10.2.2.2"},
		{"10.0.0.0/8", "10.1.2.3:5", []string{"203.0.113.9, junk"}, "10.1.2.3"},
		{"10.0.0.0/8", "10.1.2.3:5", []string{""}, "10.1.2.3"},
		{"fe80::/10", "[fe80::1%eth0]:5", []string{"203.0.113.9"}, "203.0.113.9"},
	} {
		cfg, err := loadConfig(func(name string) string { return map[string]string{"TRUSTED_PROXIES": tt.proxies}[name] })
		if err != nil {
			t.Fatal(err)
		}
		r := &http.Request{RemoteAddr: tt.peer, Header: http.Header{"X-Forwarded-For": tt.forwarded}}
		if got := (&server{cfg: cfg}).clientAddr(r); got.String() != tt.want {
			t.Errorf("peer %s, X-Forwarded-For %q, trusted %q: %s, want %s", tt.peer, tt.forwarded, tt.proxies, got, tt.want)
		}
	}
}

func TestTheQueueForBcryptIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(2)
		var entered, busy atomic.Int64
		begin := time.Now()
		for range 1000 {
			go func() {
				if err := g.enter(t.Context()); err != nil {
					busy.Add(1)
					if waited := time.Since(begin); !errors.Is(err, errTooBusy) || waited > queuePatience {
						t.Errorf("%v after %v", err, waited)
					}
					return
				}
				entered.Add(1)
				time.Sleep(250 * time.Millisecond)
				g.leave(time.Now())
			}()
		}
		synctest.Wait()
		if n := busy.Load(); n != 1000-maxQueue-2 && n != 1000-maxQueue {
			t.Errorf("%d refused at once, want all but the queue of %d", n, maxQueue)
		}
		time.Sleep(time.Minute)
		if n := entered.Load(); n < 40 || n > 45 || n+busy.Load() != 1000 {
			t.Errorf("%d had a turn within %v, %d were refused", n, queuePatience, busy.Load())
		}
		ctx, cancel := context.WithCancel(t.Context())
		g.enter(ctx)
		g.enter(ctx)
		cancel()
		if err := g.enter(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("a client that left waits on: %v", err)
		}
	})
}

func TestASlotRestsWhileSessionsAreRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(1)
		s := newServer(config{}, nil, &mapSessions{}, g, new(expvar.Map), slog.New(slog.DiscardHandler))
		lookup, _ := http.NewRequest("GET", "/user", nil)
		lookup.Header.Set("Cookie", cookieName+"="+newUUID())
		for _, tt := range []struct{ sinceRead, rest time.Duration }{{0, 200 * time.Millisecond}, {time.Second, 0}} {
			s.ServeHTTP(&recorder{header: http.Header{}}, lookup)
			time.Sleep(tt.sinceRead)
			g.enter(t.Context())
			g.leave(time.Now().Add(-300 * time.Millisecond))
			left := time.Now()
			g.enter(t.Context())
			if rest := time.Since(left); rest != tt.rest {
				t.Errorf("a lookup %v ago: a slot held for 300 ms rests %v, want %v", tt.sinceRead, rest, tt.rest)
			}
			g.leave(time.Now())
			time.Sleep(time.Second)
		}
	})
}

func TestAPanicIsAnswered500AndLogged(t *testing.T) {
	log := newLogBuffer()
	s := newServer(config{}, nil, nil, newGate(1), new(expvar.Map), slog.New(slog.NewJSONHandler(log, nil)))
	r, _ := http.NewRequest("GET", "/user", nil)
	r.Header.Set("Cookie", cookieName+"="+newUUID())
	w := &recorder{header: http.Header{}}
	s.ServeHTTP(w, r) // there is no session store
	if w.status != 500 || strings.Contains(w.body.String(), "nil pointer") {
		t.Errorf("status %d: %s", w.status, &w.body)
	}
	if line := log.find(t, "request failed"); !strings.Contains(line["err"].(string), "handlers.go") {
		t.Errorf("log line %v, want the stack", line)
	}
}

func TestTooManySignInsAreToldWhenToComeBack(t *testing.T) {
	s := newServer(config{bcryptCost: bcrypt.MinCost}, openTestDatabase(t), &mapSessions{}, newGate(1), new(expvar.Map), slog.New(slog.DiscardHandler))
	for range maxQueue {
		s.gate.queue <- struct{}{}
	}
	for _, path := range []string{"/user", "/user/signin"} {
		if w := s.post(path, credentials(newEmail(), password)); w.status != 503 || w.header.Get("Retry-After") != "10" {
			t.Errorf("POST %s: status %d, %v, want 503 and Retry-After: 10", path, w.status, w.header)
		}
	}
}

// racingSessions are sessions during whose creation another request registers the same email.
type racingSessions struct {
	mapSessions
	db *database
}

func (r *racingSessions) Create(ctx context.Context, id, replaced string, user User, ttl time.Duration) error {
	other := user
	other.ID = newUUID()
	return cmp.Or(r.mapSessions.Create(ctx, id, replaced, user, ttl), r.db.InsertUser(ctx, other, "hash"))
}

func TestARegistrationThatLosesTheRaceLeavesNoSession(t *testing.T) {
	sessions := &racingSessions{mapSessions{sessions: map[string]mapSession{}}, openTestDatabase(t)}
	s := newServer(config{bcryptCost: bcrypt.MinCost}, sessions.db, sessions, newGate(1), new(expvar.Map), slog.New(slog.DiscardHandler))
	if w := s.post("/user", credentials(newEmail(), password)); w.status != 409 || w.header.Get("Set-Cookie") != "" {
		t.Errorf("status %d, %v, want 409 and no cookie", w.status, w.header)
	}
	if len(sessions.sessions) > 0 {
		t.Errorf("left behind: %v", sessions.sessions)
	}
}

// post asks without a connection.
func (s *server) post(path, body string) *recorder {
	r, _ := http.NewRequest("POST", path, strings.NewReader(body))
	r.Header.Set("Content-Type", "application/json")
	w := &recorder{header: http.Header{}}
	s.ServeHTTP(w, r)
	return w
}

// brokenSessions is a session store out of reach.
type brokenSessions struct{ SessionStore }

func (brokenSessions) Get(context.Context, string) (User, error) {
	return User{}, unavailable(errors.New("no route to host"))
}

func TestAnOutageIsCountedAndLoggedOnceASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, metrics := newLogBuffer(), new(expvar.Map)
		s := newServer(config{}, nil, brokenSessions{}, newGate(1), metrics, slog.New(slog.NewJSONHandler(log, nil)))
		r, _ := http.NewRequest("GET", "/user", nil)
		r.Header.Set("Cookie", cookieName+"="+newUUID())
		for range 3 {
			for range 100 {
				w := &recorder{header: http.Header{}}
				if s.ServeHTTP(w, r); w.status != 503 || w.header.Get("Retry-After") == "" || strings.Contains(w.body.String(), "route") {
					t.Fatalf("status %d, %v: %s", w.status, w.header, &w.body)
				}
			}
			time.Sleep(time.Second)
		}
		if n := metrics.Get("storeErrors"); n == nil || n.String() != "300" {
			t.Errorf("counted %v errors, want 300", n)
		}
		if n := strings.Count(log.String(), "no route to host"); n != 3 {
			t.Errorf("logged %d times, want 3", n)
		}
	})
}

// recorder is a ResponseWriter for handlers called without a connection.
type recorder struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (w *recorder) Header() http.Header         { return w.header }
func (w *recorder) WriteHeader(status int)      { w.status = status }
func (w *recorder) Write(p []byte) (int, error) { return w.body.Write(p) }

// ---------------------------------------------------------------------------------------------------
// session.go

// mapSessions is a session backend in a few lines, which shows that one can be plugged in.
type mapSessions struct {
	mu       sync.Mutex
	sessions map[string]mapSession
}

type mapSession struct {
	user User
	ends time.Time
}

func (m *mapSessions) Create(_ context.Context, id, replaced string, user User, ttl time.Duration) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.sessions, replaced)
	m.sessions[id] = mapSession{user, time.Now().Add(ttl)}
	return nil
}

func (m *mapSessions) Get(_ context.Context, id string) (User, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if s, ok := m.sessions[id]; ok && time.Now().Before(s.ends) {
		return s.user, nil
	}
	return User{}, errNoSession
}

func (m *mapSessions) Delete(_ context.Context, id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.sessions, id)
	return nil
}

func (m *mapSessions) Ping(context.Context) error { return nil }
func (m *mapSessions) Close() error               { return nil }

func openRedisSessions(t testing.TB, url string) *redisSessions {
	t.Helper()
	target, ok := parseRedisURL(url)
	if !ok {
		t.Fatalf("%s is no URL", url)
	}
	s := newRedisSessions(target, new(expvar.Map))
	t.Cleanup(func() { s.Close() })
	return s
}

func openTestDatabase(t testing.TB) *database {
	t.Helper()
	db, err := openDatabase(filepath.Join(t.TempDir(), "users.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func TestSessionStores(t *testing.T) {
	t.Parallel()
	t.Run("map", func(t *testing.T) { testSessionStore(t, &mapSessions{sessions: map[string]mapSession{}}) })
	t.Run("sqlite", func(t *testing.T) { testSessionStore(t, &sqliteSessions{openTestDatabase(t)}) })
	t.Run("redis", func(t *testing.T) { testSessionStore(t, openRedisSessions(t, redisURL(t))) })
}

func testUser(i int) User {
	return User{newUUID(), fmt.Sprintf("User %d", i), fmt.Sprintf("user%d@example.com", i), "2025-03-30T20:00:00.000Z", "2025-03-31T20:00:00.123Z"}
}

// testSessionStore is what every session backend has to pass.
func testSessionStore(t *testing.T, store SessionStore) {
	ctx := t.Context()
	create := func(t *testing.T, replaced string, ttl time.Duration) (string, User) {
		t.Helper()
		id, user := newUUID(), testUser(1)
		if err := store.Create(ctx, id, replaced, user, ttl); err != nil {
			t.Fatal(err)
		}
		return id, user
	}
	none := func(t *testing.T, id string) {
		t.Helper()
		if user, err := store.Get(ctx, id); !errors.Is(err, errNoSession) || errors.Is(err, errUnavailable) || user != (User{}) {
			t.Errorf("got %v, %v, want errNoSession", user, err)
		}
	}
	some := func(t *testing.T, id string, user User) {
		t.Helper()
		if got, err := store.Get(ctx, id); got != user || err != nil {
			t.Errorf("got %v, %v, want %v", got, err, user)
		}
	}
	t.Run("what was created is found", func(t *testing.T) {
		id, user := create(t, "", time.Hour)
		some(t, id, user)
		some(t, id, user)
	})
	t.Run("missing", func(t *testing.T) { none(t, newUUID()) })
	t.Run("deleted, and deleted again", func(t *testing.T) {
		id, _ := create(t, "", time.Hour)
		other, user := create(t, "", time.Hour)
		for range 2 {
			if err := store.Delete(ctx, id); err != nil {
				t.Error(err)
			}
			none(t, id)
		}
		some(t, other, user)
	})
	t.Run("expired", func(t *testing.T) {
		id, user := create(t, "", time.Second)
		some(t, id, user)
		eventually(t, 3*time.Second, "the session ends", func() bool {
			_, err := store.Get(ctx, id)
			return errors.Is(err, errNoSession)
		})
		create(t, "", time.Hour) // sweeps
		none(t, id)
	})
	t.Run("replaced", func(t *testing.T) {
		first, _ := create(t, "", time.Hour)
		second, user := create(t, first, time.Hour)
		none(t, first)
		some(t, second, user)
		create(t, newUUID(), time.Hour) // replacing none is no error
	})
	t.Run("text of any kind", func(t *testing.T) {
		id, user := newUUID(), testUser(1)
		user.Name, user.Email = "李 \r\n$5\r\n*1\x00\xff\"'", strings.Repeat("x", 5000)
		if err := store.Create(ctx, id, "", user, time.Hour); err != nil {
			t.Fatal(err)
		}
		some(t, id, user)
	})
	t.Run("200 at once, each its own", func(t *testing.T) {
		ids, users := make([]string, 200), make([]User, 200)
		together(200, func(i int) {
			ids[i], users[i] = newUUID(), testUser(i)
			err := store.Create(ctx, ids[i], "", users[i], time.Hour)
			for errors.Is(err, errUnavailable) { // a slow disk may not take all of them in time
				err = store.Create(ctx, ids[i], "", users[i], time.Hour)
			}
			if err != nil {
				t.Error(err)
			}
			for range 10 {
				if user, err := store.Get(ctx, ids[i]); err != nil || user != users[i] {
					t.Errorf("got %v, %v, want %v", user, err, users[i])
				}
			}
		})
	})
	t.Run("deleted while it is read", func(t *testing.T) {
		for range 20 {
			id, user := create(t, "", time.Hour)
			var deleted atomic.Bool
			together(9, func(i int) {
				if i == 0 {
					if err := store.Delete(ctx, id); err != nil {
						t.Error(err)
					}
					deleted.Store(true)
					return
				}
				for range 20 {
					gone := deleted.Load()
					if got, err := store.Get(ctx, id); err == nil && (gone || got != user) || err != nil && !errors.Is(err, errNoSession) {
						t.Errorf("got %v, %v (deleted before: %v)", got, err, gone)
					}
				}
			})
			none(t, id)
		}
	})
	t.Run("ping", func(t *testing.T) {
		if err := store.Ping(ctx); err != nil {
			t.Error(err)
		}
	})
}

func TestTroubleIsNotAbsence(t *testing.T) {
	target, _ := parseRedisURL("redis://127.0.0.1:" + freePort(t))
	db := openTestDatabase(t)
	db.Close()
	for name, store := range map[string]SessionStore{"redis": newRedisSessions(target, new(expvar.Map)), "sqlite": &sqliteSessions{db}} {
		_, get := store.Get(t.Context(), newUUID())
		for what, err := range map[string]error{
			"Get": get, "Ping": store.Ping(t.Context()), "Delete": store.Delete(t.Context(), newUUID()),
			"Create": store.Create(t.Context(), newUUID(), "", testUser(1), time.Hour),
		} {
			if err == nil || errors.Is(err, errNoSession) || name == "redis" && !errors.Is(err, errUnavailable) {
				t.Errorf("%s %s of a store that is away: %v", name, what, err)
			}
		}
	}
}

func TestWhatWaitsForRedisIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // it fails when a lookup waits
		s := newRedisSessions(nil, new(expvar.Map))
		s.turn <- struct{}{} // a batch is on the wire
		for range maxBatch {
			s.waiting <- new(operation)
		}
		if _, err := s.Get(t.Context(), newUUID()); !errors.Is(err, errUnavailable) {
			t.Errorf("a lookup behind %d others: %v, want errUnavailable", maxBatch, err)
		}
	})
}

func TestWritingToRedisIsBoundedInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		ended := make(chan struct{})
		go func() { // takes each write in time, so that the end never comes
			defer close(ended)
			for buf := make([]byte, 4<<10); ; time.Sleep(exchangeTimeout * 3 / 10) {
				if _, err := server.Read(buf); err != nil {
					return
				}
			}
		}()
		c := redis.NewConn(&guardedConn{Conn: client}, 0, 0)
		begin := time.Now()
		for c.Send("HGETALL", sessionKey(newUUID())) == nil && time.Since(begin) < time.Hour {
		}
		if took := time.Since(begin); took != exchangeTimeout {
			t.Errorf("given up after %v, want %v", took, exchangeTimeout)
		}
		c.Close()
		<-ended
	})
}

func TestOnlyProvenRepliesAreBelieved(t *testing.T) {
	get, del := []any{"HGETALL", "session:1"}, []any{"DEL", "session:1"}
	hash, nonce, one := []any{[]byte("id"), []byte("1")}, []byte("nonce"), int64(1)
	wrongType := redis.Error("WRONGTYPE Operation against a key holding the wrong kind of value")
	for name, tt := range map[string]struct {
		cmds, all, want []any // want nil: nothing is believed
	}{
		"a lookup":                     {[]any{get}, []any{hash, nonce}, []any{hash, nonce}},
		"a deletion":                   {[]any{del}, []any{one, nonce}, []any{one, nonce}},
		"a ping":                       {nil, []any{nonce}, []any{nonce}},
		"no hash":                      {[]any{get}, []any{wrongType, nonce}, []any{[]any{}, nonce}},
		"another's nonce":              {[]any{get}, []any{hash, []byte("other")}, nil},
		"a reply too few":              {[]any{get}, []any{nonce}, nil},
		"a reply too many":             {[]any{get}, []any{hash, nonce, hash}, nil},
		"a lookup answered a number":   {[]any{get}, []any{one, nonce}, nil},
		"a lookup answered nothing":    {[]any{get}, []any{nil, nonce}, nil},
		"a lookup answered a text":     {[]any{get}, []any{[]byte("text"), nonce}, nil},
		"a deletion answered a hash":   {[]any{del}, []any{hash, nonce}, nil},
		"a deletion answered OK":       {[]any{del}, []any{"OK", nonce}, nil},
		"a refusal":                    {[]any{get}, []any{redis.Error("NOPERM"), nonce}, nil},
		"a batch":                      {[]any{get, del}, []any{"OK", "QUEUED", "QUEUED", "QUEUED", []any{hash, one, nonce}}, []any{hash, one, nonce}},
		"a batch with no hash":         {[]any{get, del}, []any{"OK", "QUEUED", "QUEUED", "QUEUED", []any{wrongType, one, nonce}}, []any{[]any{}, one, nonce}},
		"a batch with another's nonce": {[]any{get, get}, []any{"OK", "QUEUED", "QUEUED", "QUEUED", []any{hash, hash, []byte("other")}}, nil},
		"a batch too short":            {[]any{get, get}, []any{"OK", "QUEUED", "QUEUED", "QUEUED", []any{hash, nonce}}, nil},
		"a batch with replies swapped": {[]any{get, del}, []any{"OK", "QUEUED", "QUEUED", "QUEUED", []any{one, hash, nonce}}, nil},
		"a batch with a refusal":       {[]any{get, del}, []any{"OK", "QUEUED", "QUEUED", "QUEUED", []any{hash, redis.Error("OOM"), nonce}}, nil},
		"a batch not queued":           {[]any{get, del}, []any{"OK", "QUEUED", redis.Error("OOM"), "QUEUED", redis.Error("EXECABORT")}, nil},
		"a batch not run":              {[]any{get, get}, []any{"OK", "QUEUED", "QUEUED", "QUEUED", nil}, nil},
	} {
		var cmds [][]any
		for _, cmd := range tt.cmds {
			cmds = append(cmds, cmd.([]any))
		}
		replies, err := proven(tt.all, cmds, "nonce")
		if !reflect.DeepEqual(replies, tt.want) || (err == nil) != (tt.want != nil) {
			t.Errorf("%s: %v, %v, want %v", name, replies, err, tt.want)
		}
	}
}

func TestTheGuardFollowsReplies(t *testing.T) {
	for _, text := range []string{
		"+OK\r\n", "-ERR $5 *7 - no\r\n", ":12\r\n", ":-12\r\n", "$-1\r\n", "*-1\r\n", "$0\r\n\r\n", "*0\r\n",
		"$11\r\n$99\r\n*99\r\n-\r\n", "*3\r\n$2\r\nid\r\n*1\r\n$10\r\n0123456789\r\n:7\r\n",
		"$10\r\n0\r\n$30\r\nxx\r\n", "$9\r\n0\r\n$29\r\nx\r\n",
	} {
		guarded := &guardedConn{Conn: &answeringConn{answer: iotest.OneByteReader(strings.NewReader(text))}}
		c := redis.NewConn(guarded, 0, 0)
		c.Send("PING")
		if _, err := redis.Values(c.Do("")); err != nil {
			t.Errorf("%q: %v", text, err)
		}
		if guarded.kind != 0 || guarded.skip != 0 {
			t.Errorf("%q: after it %q is a reply begun, of which %d bytes are to come", text, guarded.kind, guarded.skip)
		}
	}
}

func TestAConnectionIsReplacedInTime(t *testing.T) {
	r := ownRedis(t)
	s := openRedisSessions(t, r.url())
	ours := func() []string { // ids of the connections but redisDo's
		s.Ping(t.Context())
		list, _ := redis.String(redisDo(t, r.url(), "CLIENT", "LIST"), nil)
		return regexp.MustCompile(`(?m)^id=\d+.* cmd=ping `).FindAllString(list, -1)
	}
	id := func(client string) string { return strings.Fields(client)[0] }
	first := ours()
	if again := ours(); len(first) != 1 || len(again) != 1 || id(first[0]) != id(again[0]) {
		t.Fatalf("connections %q, then %q, want one and the same", first, again)
	}
	defer runtime.KeepAlive(s.conn) // it has to be closed, not collected
	s.dialed = s.dialed.Add(-connLifetime)
	eventually(t, 10*time.Second, "one connection, another one", func() bool {
		now := ours()
		return len(now) == 1 && id(now[0]) != id(first[0])
	})
}

// panickingConn panics at whatever it is asked to do.
type panickingConn struct{ redis.Conn }

func (panickingConn) Err() error { return nil }

func TestAPanicIsNoAnswerToOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newRedisSessions(nil, new(expvar.Map))
		s.conn, s.dialed = panickingConn{}, time.Now()
		s.turn <- struct{}{} // a batch is on the wire
		var panicked, unavailable atomic.Int64
		for range 10 {
			go func() {
				defer func() {
					if recover() != nil {
						panicked.Add(1)
					}
				}()
				if _, err := s.Get(t.Context(), newUUID()); errors.Is(err, errUnavailable) {
					unavailable.Add(1)
				}
			}()
		}
		synctest.Wait()
		<-s.turn
		synctest.Wait()
		if panicked.Load() != 1 || unavailable.Load() != 9 {
			t.Errorf("of 10 lookups %d panicked and %d were told that the store is unavailable, want 1 and 9", panicked.Load(), unavailable.Load())
		}
	})
}

// monitor returns what Redis is sent by others than redisDo while do runs, a line for each command.
func monitor(t *testing.T, url string, do func()) (commands []string) {
	t.Helper()
	c, err := redis.DialURL(url)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Do("MONITOR"); err != nil {
		t.Fatal(err)
	}
	do()
	end := newUUID()
	redisDo(t, url, "ECHO", end)
	for {
		line, err := redis.String(redis.ReceiveWithTimeout(c, 10*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(line, end) {
			return commands
		}
		_, command, _ := strings.Cut(line, "] ")
		commands = append(commands, command)
	}
}

func TestWhatRedisIsSent(t *testing.T) {
	t.Parallel()
	r := ownRedis(t)
	s := start(t, "REDIS_URL="+r.url())
	first := newUUID()
	var user User
	var id string
	nonces := map[string]bool{}
	expect := func(what string, do func(), want ...string) {
		t.Helper()
		got := monitor(t, r.url(), do)
		for i, line := range got {
			if nonce, isPing := strings.CutPrefix(line, `"PING" `); isPing {
				if len(nonce) < 28 || nonces[nonce] {
					t.Errorf("%s: PING %s is short or was used before", what, nonce)
				}
				nonces[nonce] = true
				got[i] = `"PING" nonce`
			}
		}
		for i := range want {
			want[i] = strings.NewReplacer("ID", id, "FIRST", first, "USER", user.ID, "EMAIL", user.Email, "TIME", user.CreatedAt).Replace(want[i])
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s sent\n%s\nwant\n%s", what, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
	create := monitor(t, r.url(), func() { user, id = s.register(newEmail(), cookie(first)) })
	want := []string{`"MULTI"`, `"DEL" "session:` + first + `"`,
		fmt.Sprintf(`"HSET" "session:%s" "id" "%s" "name" "Ada Lovelace" "email" "%s" "createdAt" "%s" "updatedAt" "%[4]s"`, id, user.ID, user.Email, user.CreatedAt),
		`"EXPIRE" "session:` + id + `" "604800"`}
	if len(create) != 6 || !slices.Equal(create[:4], want) || !strings.HasPrefix(create[4], `"PING" `) || create[5] != `"EXEC"` {
		t.Errorf("POST /user sent\n%s\nwant\n%s", strings.Join(create, "\n"), strings.Join(want, "\n"))
	}
	expect("GET /user", func() { s.want(200, id) }, `"HGETALL" "session:ID"`, `"PING" nonce`)
	expect("GET /user again", func() { s.want(200, id) }, `"HGETALL" "session:ID"`, `"PING" nonce`)
	expect("GET /user without a cookie", func() { s.ask("GET", "/user", "") })
	expect("GET /user with a cookie that is no UUID", func() { s.want(401, "*") })
	expect("POST /user/signin in vain", func() { s.ask("POST", "/user/signin", credentials(user.Email, "wrong password")) })
	expect("GET /healthz", func() { s.ask("GET", "/healthz", "") }, `"PING" nonce`)
	expect("DELETE /user/session", func() { s.ask("DELETE", "/user/session", "", cookie(id)) }, `"DEL" "session:ID"`, `"PING" nonce`)
	expect("DELETE /user/session without a cookie", func() { s.ask("DELETE", "/user/session", "") })
}

func TestSessionHashAndLife(t *testing.T) {
	t.Parallel()
	url := redisURL(t)
	s := start(t, "REDIS_URL="+url)
	user, id := s.register(newEmail())
	got, err := redis.StringMap(redisDo(t, url, "HGETALL", "session:"+id), nil)
	want := map[string]string{"id": user.ID, "name": user.Name, "email": user.Email, "createdAt": user.CreatedAt, "updatedAt": user.UpdatedAt}
	if err != nil || !maps.Equal(got, want) {
		t.Errorf("hash is %v, want %v", got, want)
	}
	for range 3 {
		s.want(200, id)
	}
	ttl := redisDo(t, url, "TTL", "session:"+id).(int64)
	if ttl > 604800 || ttl < 604790 {
		t.Errorf("life is %d s, want 604800", ttl)
	}
	redisDo(t, url, "EXPIRE", "session:"+id, 100)
	if s.want(200, id); redisDo(t, url, "TTL", "session:"+id).(int64) > 100 {
		t.Error("use prolongs a session")
	}
}

func TestHashesOfTheOriginal(t *testing.T) {
	t.Parallel()
	url := redisURL(t)
	s := start(t, "REDIS_URL="+url)
	for _, tt := range []struct {
		what   string
		fields []any
		want   string // createdAt, "" for no session
	}{
		{"ISO", []any{"id", "7", "name", "Ada", "email", "a@b", "createdAt", "2025-03-30T20:00:00.000Z", "updatedAt", "2025-03-30T20:00:00.000Z"}, "2025-03-30T20:00:00.000Z"},
		{"Date.toString", []any{"id", "7", "name", "Ada", "email", "a@b", "createdAt", "Sun Mar 30 2025 20:00:00 GMT+0000 (Coordinated Universal Time)", "updatedAt", "2025-03-30T20:00:00Z"}, "2025-03-30T20:00:00.000Z"},
		{"Date.toString elsewhere", []any{"id", "7", "name", "Ada", "email", "a@b", "createdAt", "Sun Mar 30 2025 22:00:00 GMT+0200 (Central European Summer Time)", "updatedAt", "2025-03-30T20:00:00Z"}, "2025-03-30T20:00:00.000Z"},
		{"an offset", []any{"id", "7", "createdAt", "2025-03-30T22:00:00.5+02:00", "updatedAt", "2025-03-30T20:00:00Z"}, "2025-03-30T20:00:00.500Z"},
		{"more fields than known", []any{"id", "7", "role", "admin", "createdAt", "2025-03-30T20:00:00.000Z", "updatedAt", "2025-03-30T20:00:00Z"}, "2025-03-30T20:00:00.000Z"},
		{"no id", []any{"name", "Ada", "createdAt", "2025-03-30T20:00:00.000Z", "updatedAt", "2025-03-30T20:00:00Z"}, ""},
		{"an empty id", []any{"id", "", "createdAt", "2025-03-30T20:00:00.000Z", "updatedAt", "2025-03-30T20:00:00Z"}, ""},
		{"no times", []any{"id", "7"}, ""},
		{"Invalid Date", []any{"id", "7", "createdAt", "Invalid Date", "updatedAt", "2025-03-30T20:00:00Z"}, ""},
		{"milliseconds", []any{"id", "7", "createdAt", "1743364800000", "updatedAt", "2025-03-30T20:00:00Z"}, ""},
	} {
		id := newUUID()
		redisDo(t, url, "HSET", append([]any{"session:" + id}, tt.fields...)...)
		redisDo(t, url, "EXPIRE", "session:"+id, 60)
		a := s.ask("GET", "/user", "", cookie(id))
		if tt.want == "" && a.status != 401 || tt.want != "" && (a.status != 200 || !strings.Contains(a.body, `"createdAt":"`+tt.want+`"`)) {
			t.Errorf("%s: status %d: %s, want %s", tt.what, a.status, a.body, cmp.Or(tt.want, "401"))
		}
		if a := s.ask("DELETE", "/user/session", "", cookie(id)); a.status != 204 || redisDo(t, url, "EXISTS", "session:"+id).(int64) != 0 {
			t.Errorf("%s: DELETE status %d", tt.what, a.status)
		}
	}
	id := newUUID()
	redisDo(t, url, "SET", "session:"+id, "a string", "EX", 60)
	other := newUUID()
	redisDo(t, url, "HSET", "session:"+other, "id", "7", "createdAt", "2025-03-30T20:00:00Z", "updatedAt", "2025-03-30T20:00:00Z")
	redisDo(t, url, "EXPIRE", "session:"+other, 60)
	together(20, func(i int) { // in one batch, too
		if i%2 == 0 {
			s.want(401, id)
		} else {
			s.want(200, other)
		}
	})
}

func TestRedisURLs(t *testing.T) {
	for url, want := range map[string]redisTarget{
		"redis://localhost:6379":                     {addrs: []string{"localhost:6379"}},
		"redis://localhost:6379/":                    {addrs: []string{"localhost:6379"}},
		"rediss://u%40x:p%2Fw@[::1]:6380/15":         {addrs: []string{"[::1]:6380"}},
		"redis://:p:w@h:1/2":                         {addrs: []string{"h:1"}},
		"redis-sentinel://a:1,b:2,c:3/mymaster":      {addrs: []string{"a:1", "b:2", "c:3"}, primary: "mymaster"},
		"redis-sentinel://u:p@a:1/my-master.1/3":     {addrs: []string{"a:1"}, primary: "my-master.1"},
		"redis-sentinel://a:26379,[fd00::1]:26379/7": {addrs: []string{"a:26379", "[fd00::1]:26379"}, primary: "7"},
	} {
		scheme, _, _ := strings.Cut(url, ":")
		if got, ok := parseRedisURL(url); !ok || got.scheme != scheme || !slices.Equal(got.addrs, want.addrs) || got.primary != want.primary {
			t.Errorf("%s: got %+v, %v, want %+v", url, got, ok, want)
		} else if text := redactURL(got.url); strings.Contains(text, "@") || !strings.Contains(text, got.addrs[0]) {
			t.Errorf("%s: shown as %s", url, text)
		}
	}
}

func TestRedisWithUserPasswordAndDatabase(t *testing.T) {
	t.Parallel()
	r := ownRedis(t, "--user", "default", "off", "--user", "svc", "on", ">s3cr:t/@", "~session:*", "+@all")
	s := start(t, "REDIS_URL=redis://svc:s3cr%3At%2F%40@127.0.0.1:"+r.port+"/3")
	s.secret("s3cr")
	_, id := s.register(newEmail())
	s.want(200, id)
	c, err := redis.DialURL("redis://svc:s3cr%3At%2F%40@127.0.0.1:" + r.port + "/3")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if n, err := redis.Int(c.Do("EXISTS", "session:"+id)); n != 1 || err != nil {
		t.Errorf("the session is not in database 3: %v", err)
	}
}

// ---------------------------------------------------------------------------------------------------
// store.go

func TestEmbeddedSessionsOutliveARestart(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "a folder?#%20", "users.db")
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	s := start(t, "DB_PATH="+path)
	email := newEmail()
	user, id := s.register(email)
	s.stop()
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 && runtime.GOOS != "windows" {
		t.Errorf("the file: %v, %v, want it readable to its owner only", info, err)
	}
	s = start(t, "DB_PATH="+path)
	if a := s.want(200, id); a.body != userJSON(user) {
		t.Errorf("got %s", a.body)
	}
	s.signIn(email)
}

func TestEveryConnectionHasThePragmas(t *testing.T) {
	db := openTestDatabase(t)
	for name, pool := range map[string]*sql.DB{"writer": db.writer, "reader": db.reader} {
		for range pool.Stats().MaxOpenConnections {
			c, err := pool.Conn(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			for pragma, want := range map[string]string{"journal_mode": "wal", "synchronous": "2", "busy_timeout": "2000", "foreign_keys": "1", "temp_store": "2"} {
				var got string
				if err := c.QueryRowContext(t.Context(), "PRAGMA "+pragma).Scan(&got); err != nil || got != want {
					t.Errorf("%s: PRAGMA %s is %s, %v, want %s", name, pragma, got, err, want)
				}
			}
		}
	}
}

func TestSessionRowsHoldNoSessionID(t *testing.T) {
	t.Parallel()
	s := start(t)
	_, id := s.register(newEmail())
	s.stop()
	files, _ := filepath.Glob(s.dbPath + "*")
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil || bytes.Contains(text, []byte(id)) || bytes.Contains(text, []byte(password)) {
			t.Errorf("%s holds a session id or a password (%v)", file, err)
		}
	}
}

func TestExpiredSessionsAreSwept(t *testing.T) {
	t.Parallel()
	db := openTestDatabase(t)
	store := &sqliteSessions{db}
	for range 150 {
		if err := store.Create(t.Context(), newUUID(), "", testUser(1), -time.Second); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := store.Create(t.Context(), newUUID(), "", testUser(1), time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	var n int
	if err := db.reader.QueryRow(`SELECT count(*) FROM sessions`).Scan(&n); err != nil || n != 2 {
		t.Errorf("%d rows, %v, want the two sessions that live", n, err)
	}
}

func TestStoreErrors(t *testing.T) {
	t.Parallel()
	db := openTestDatabase(t)
	user := testUser(1)
	if err := db.InsertUser(t.Context(), user, "hash"); err != nil {
		t.Fatal(err)
	}
	twin := testUser(1)
	if err := db.InsertUser(t.Context(), twin, "hash"); !errors.Is(err, errEmailTaken) {
		t.Errorf("the same email again: %v, want errEmailTaken", err)
	}
	twin.Email = "other@example.com"
	twin.ID = user.ID
	if err := db.InsertUser(t.Context(), twin, "hash"); err == nil || errors.Is(err, errEmailTaken) || errors.Is(err, errUnavailable) {
		t.Errorf("the same id again: %v, want a fault of ours", err)
	}
	if _, _, err := db.UserByEmail(t.Context(), "nobody@example.com"); !errors.Is(err, errUserNotFound) {
		t.Errorf("nobody: %v, want errUserNotFound", err)
	}
	if got, hash, err := db.UserByEmail(t.Context(), user.Email); got != user || hash != "hash" || err != nil {
		t.Errorf("got %v, %s, %v", got, hash, err)
	}
	for _, late := range []error{context.DeadlineExceeded, sql.ErrTxDone} { // what database/sql says of a write out of time
		if err := storeError("writing", late); !errors.Is(err, errUnavailable) {
			t.Errorf("%v, want errUnavailable", err)
		}
	}
	if err := db.ReplacePasswordHash(t.Context(), user.ID, "older", "newer"); err != nil {
		t.Error(err)
	}
	if _, hash, _ := db.UserByEmail(t.Context(), user.Email); hash != "hash" {
		t.Errorf("a hash that had changed meanwhile was replaced, by %s", hash)
	}
}

// ---------------------------------------------------------------------------------------------------
// Faults: what breaks, and what the service makes of it. SESSION_STORAGE_LONG=1 runs the long forms.

var long = os.Getenv("SESSION_STORAGE_LONG") != ""

// rounds is how often a test of chance is repeated.
func rounds(short, whenLong int) int {
	if long {
		return whenLong
	}
	return short
}

// proxy stands between the service and its Redis, and does what a bad network does, or worse.
type proxy struct {
	addr  string
	mu    sync.Mutex
	conns map[net.Conn]bool
	fault fault
}

// fault is given a whole reply of Redis and returns what the service receives in its stead, or an error
// to cut the connection after that.
type fault func(reply []byte) ([]byte, error)

func startProxy(t testing.TB, target string) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{addr: l.Addr().String(), conns: map[net.Conn]bool{}}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go p.serve(c, target)
		}
	}()
	t.Cleanup(func() { l.Close(); p.cut() })
	return p
}

func (p *proxy) url() string { return "redis://" + p.addr }

// set changes the fault and cuts the connections that are open.
func (p *proxy) set(f fault) {
	p.mu.Lock()
	p.fault = f
	p.mu.Unlock()
	p.cut()
}

func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		c.Close()
	}
}

func (p *proxy) serve(client net.Conn, target string) {
	defer client.Close()
	server, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	defer server.Close()
	p.mu.Lock()
	p.conns[client] = true
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.conns, client)
		p.mu.Unlock()
	}()
	go func() {
		defer server.Close()
		io.Copy(server, client)
	}()
	replies := bufio.NewReader(server)
	for {
		reply, err := readReply(replies)
		if err != nil {
			return
		}
		p.mu.Lock()
		f := p.fault
		p.mu.Unlock()
		if f != nil {
			reply, err = f(reply)
		}
		if len(reply) > 0 {
			client.Write(reply)
		}
		if err != nil {
			return
		}
	}
}

// delayed passes bytes on to target at once, and back after d.
func delayed(t testing.TB, target string, d time.Duration) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	pass := func(to, from net.Conn) {
		defer to.Close()
		type chunk struct {
			due  time.Time
			data []byte
		}
		chunks := make(chan chunk, 1000)
		go func() {
			defer close(chunks)
			for {
				buf := make([]byte, 64<<10)
				n, err := from.Read(buf)
				if n > 0 {
					chunks <- chunk{time.Now().Add(d), buf[:n]}
				}
				if err != nil {
					return
				}
			}
		}()
		for c := range chunks {
			time.Sleep(time.Until(c.due))
			to.Write(c.data)
		}
	}
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", target)
			if err != nil {
				client.Close()
				continue
			}
			go func() {
				defer server.Close()
				io.Copy(server, client)
			}()
			go pass(client, server)
		}
	}()
	return l.Addr().String()
}

// readReply reads one whole reply of RESP 2.
func readReply(r *bufio.Reader) ([]byte, error) {
	line, err := r.ReadBytes('\n')
	if err != nil {
		return nil, err
	}
	n, _ := strconv.Atoi(string(bytes.TrimSpace(line[1:])))
	switch line[0] {
	case '$':
		if n >= 0 {
			body := make([]byte, n+2)
			if _, err := io.ReadFull(r, body); err != nil {
				return nil, err
			}
			line = append(line, body...)
		}
	case '*':
		for range n {
			element, err := readReply(r)
			if err != nil {
				return nil, err
			}
			line = append(line, element...)
		}
	}
	return line, nil
}

// --- Faults: Redis away

func TestRedisOutOfReach(t *testing.T) {
	t.Parallel()
	var waves sync.Mutex // one at a time, or they would measure each other
	errCut := errors.New("cut")
	faults := map[string]fault{
		"black hole":       func([]byte) ([]byte, error) { return nil, nil },
		"cut":              func([]byte) ([]byte, error) { return nil, errCut },
		"half a reply":     func(reply []byte) ([]byte, error) { return reply[:len(reply)/2], errCut },
		"half, then none":  func(reply []byte) ([]byte, error) { return reply[:len(reply)/2], nil },
		"garbage":          func([]byte) ([]byte, error) { return []byte("HTTP/1.1 400 Bad Request\r\n\r\n"), nil },
		"a huge string":    func([]byte) ([]byte, error) { return []byte("$99999999999999\r\n"), nil },
		"a huge array":     func([]byte) ([]byte, error) { return []byte("*2147483647\r\n"), nil },
		"deep nesting":     func([]byte) ([]byte, error) { return bytes.Repeat([]byte("*1\r\n"), 1<<20), nil },
		"an endless line":  func([]byte) ([]byte, error) { return bytes.Repeat([]byte("+"), 8<<20), nil },
		"the wrong shapes": func([]byte) ([]byte, error) { return []byte(":1\r\n"), nil },
	}
	test := func(t *testing.T, r *redisServer, url string, fail, heal func(), lost bool) {
		s := start(t, "REDIS_URL="+url)
		s.faulty = true
		email := newEmail()
		s.addAccount(email, bcrypt.MinCost)
		_, id := s.register(newEmail())
		accounts := s.count(`SELECT count(*) FROM users`)
		fail()
		s.unavailable(id, email)
		var worst atomic.Int64
		waves.Lock()
		together(500, func(int) {
			begin := time.Now()
			s.want(503, id)
			raise(&worst, time.Since(begin))
		})
		waves.Unlock()
		if d := time.Duration(worst.Load()); d > 3*time.Second {
			t.Errorf("500 at once: an answer took %v", d)
		}
		if n := s.count(`SELECT count(*) FROM users`); n != accounts {
			t.Errorf("registrations that failed left %d accounts behind", n-accounts)
		}
		var mem runtime.MemStats
		if runtime.ReadMemStats(&mem); mem.HeapAlloc > 512<<20 || runtime.NumGoroutine() > 20_000 {
			t.Errorf("the heap is at %d MB, %d goroutines run", mem.HeapAlloc>>20, runtime.NumGoroutine())
		}
		heal()
		healed := time.Now()
		eventually(t, 10*time.Second, "the service is back", func() bool { return s.ask("GET", "/healthz", "").status == 200 })
		if d := time.Since(healed); d > 2*time.Second {
			t.Errorf("back after %v, want 2 s", d)
		}
		t.Logf("worst answer %v, back after %v", time.Duration(worst.Load()).Round(time.Millisecond), time.Since(healed).Round(time.Millisecond))
		if lost {
			s.want(401, id)
		} else {
			s.want(200, id)
		}
		s.want(200, s.signIn(email))
		s.register(newEmail())
		r.wantEnds(t)
	}
	for name, f := range faults {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := ownRedis(t)
			p := startProxy(t, "127.0.0.1:"+r.port)
			test(t, r, p.url(), func() { p.set(f) }, func() { p.set(nil) }, false)
		})
	}
	t.Run("killed", func(t *testing.T) {
		t.Parallel()
		r := ownRedis(t)
		test(t, r, r.url(), r.kill, func() { r.launch(t) }, true)
	})
	t.Run("killed, and back with its data", func(t *testing.T) {
		t.Parallel()
		r := ownRedis(t, "--appendonly", "yes", "--appendfsync", "always")
		test(t, r, r.url(), r.kill, func() { r.launch(t) }, false)
	})
	t.Run("frozen", func(t *testing.T) {
		t.Parallel()
		r := ownRedis(t)
		test(t, r, r.url(), func() { r.signal(t, "STOP") }, func() { r.signal(t, "CONT") }, false)
	})
}

// unavailable checks that every endpoint that needs the store says so, in time, and clears no cookie.
func (s *service) unavailable(id, email string) {
	s.Helper()
	other := newUUID() // what is not answered may yet have been done
	for _, tt := range []struct{ method, path, body, id string }{
		{"GET", "/user", "", id}, {"DELETE", "/user/session", "", other}, {"GET", "/healthz", "", ""},
		{"POST", "/user/signin", credentials(email, password), other}, {"POST", "/user", credentials(newEmail(), password), other},
	} {
		begin := time.Now()
		a := s.ask(tt.method, tt.path, tt.body, cookie(tt.id)) // no 503 sets a cookie: see check
		if d := time.Since(begin); a.status != 503 || d > 3*time.Second {
			s.Errorf("%s %s: status %d after %v, want 503 within 3 s: %s", tt.method, tt.path, a.status, d, a.body)
		}
	}
	if a := s.ask("GET", "/user", ""); a.status != 401 {
		s.Errorf("GET /user without a cookie: status %d, want 401", a.status)
	}
}

// wantEnds checks that no session can stay for ever.
func (r *redisServer) wantEnds(t testing.TB) {
	t.Helper()
	keys, err := redis.Strings(redisDo(t, r.url(), "KEYS", "session:*"), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range keys {
		if ttl := redisDo(t, r.url(), "TTL", key).(int64); ttl < 0 && ttl != -2 {
			t.Errorf("%s has no end", key)
		}
	}
}

func TestStartsWithoutItsRedis(t *testing.T) {
	t.Parallel()
	r := ownRedis(t)
	r.kill()
	s := start(t, "REDIS_URL="+r.url())
	s.faulty = true
	email := newEmail()
	s.addAccount(email, bcrypt.MinCost)
	s.log.find(t, "session store out of reach, answering 503 until it is back")
	s.unavailable(newUUID(), email)
	r.launch(t)
	begin := time.Now()
	eventually(t, 2*time.Second, "the service is back", func() bool { return s.ask("GET", "/healthz", "").status == 200 })
	t.Logf("back after %v", time.Since(begin))
	s.want(200, s.signIn(email))
	s.log.find(t, "store out of reach")
}

func TestRedisWithTheWrongPassword(t *testing.T) {
	t.Parallel()
	r := ownRedis(t, "--requirepass", "right")
	for _, url := range []string{r.url(), "redis://:wrong@127.0.0.1:" + r.port} {
		s := start(t, "REDIS_URL="+url)
		s.faulty = true
		s.secret("wrong@")
		email := newEmail()
		s.addAccount(email, bcrypt.MinCost)
		s.unavailable(newUUID(), email)
	}
}

func TestConnectionsThatDiedIdleAreNotNoticed(t *testing.T) {
	t.Parallel()
	r := ownRedis(t)
	p := startProxy(t, "127.0.0.1:"+r.port)
	s := start(t, "REDIS_URL="+p.url())
	_, id := s.register(newEmail())
	for range 20 {
		s.want(200, id)
		p.cut()
		s.want(200, id)
		p.cut()
		if a := s.ask("GET", "/healthz", ""); a.status != 200 {
			t.Errorf("GET /healthz: status %d", a.status)
		}
	}
}

func TestRepliesByteByByte(t *testing.T) {
	t.Parallel()
	r := ownRedis(t)
	l := startProxy(t, "127.0.0.1:"+r.port)
	s := start(t, "REDIS_URL="+l.url())
	user, id := s.register(newEmail())
	l.set(func(reply []byte) ([]byte, error) {
		l.mu.Lock()
		defer l.mu.Unlock()
		for c := range l.conns { // one connection at a time is in use here
			for _, b := range reply {
				c.Write([]byte{b})
			}
		}
		return nil, nil
	})
	for range 3 {
		if a := s.want(200, id); a.body != userJSON(user) {
			t.Errorf("got %s", a.body)
		}
	}
}

// --- Faults: Redis that refuses

func TestRedisThatRefuses(t *testing.T) {
	t.Parallel()
	// begin starts the service with an account and an open session.
	begin := func(t *testing.T, url string) (s *service, email, id string) {
		s = start(t, "REDIS_URL="+url)
		s.faulty = true
		email = newEmail()
		s.addAccount(email, bcrypt.MinCost)
		return s, email, s.signIn(email)
	}
	refused := func(s *service, email string) {
		s.Helper()
		if a := s.ask("POST", "/user/signin", credentials(email, password)); a.status != 503 {
			s.Errorf("POST /user/signin: status %d, want 503", a.status)
		}
		if a := s.ask("POST", "/user", credentials(newEmail(), password)); a.status != 503 || s.count(`SELECT count(*) FROM users`) != 1 {
			s.Errorf("POST /user: status %d, want 503 and no account left behind", a.status)
		}
	}
	t.Run("full", func(t *testing.T) {
		r := ownRedis(t)
		s, email, id := begin(t, r.url())
		redisDo(t, r.url(), "CONFIG", "SET", "maxmemory", "1")
		refused(s, email)
		together(64, func(int) { s.want(200, id) })
		if a := s.ask("DELETE", "/user/session", "", cookie(id)); a.status != 204 {
			t.Errorf("DELETE /user/session: status %d, want 204", a.status)
		}
		s.want(401, id)
		redisDo(t, r.url(), "CONFIG", "SET", "maxmemory", "0")
		s.want(200, s.signIn(email))
		r.wantEnds(t)
	})
	t.Run("an EXPIRE that did nothing", func(t *testing.T) {
		r := ownRedis(t)
		p := startProxy(t, "127.0.0.1:"+r.port)
		s, email, id := begin(t, p.url())
		p.set(func(reply []byte) ([]byte, error) {
			return bytes.Replace(reply, []byte("\r\n:1\r\n"), []byte("\r\n:0\r\n"), 1), nil
		})
		refused(s, email)
		s.want(200, id)
		eventually(t, 10*time.Second, "no other session is left", func() bool { return redisDo(t, r.url(), "DBSIZE") == any(int64(1)) })
	})
	t.Run("a replica", func(t *testing.T) {
		r, primary := ownRedis(t), ownRedis(t)
		s, email, id := begin(t, r.url())
		redisDo(t, primary.url(), "RESTORE", "session:"+id, 600_000, redisDo(t, r.url(), "DUMP", "session:"+id))
		redisDo(t, r.url(), "REPLICAOF", "127.0.0.1", primary.port)
		eventually(t, 10*time.Second, "the replica is in step", func() bool {
			info, _ := redis.String(redisDo(t, r.url(), "INFO", "replication"), nil)
			return strings.Contains(info, "master_link_status:up")
		})
		refused(s, email)
		s.want(200, id)
		if a := s.ask("DELETE", "/user/session", "", cookie(id)); a.status != 503 {
			t.Errorf("DELETE /user/session: status %d, want 503", a.status)
		}
		s.want(200, id)
		redisDo(t, r.url(), "REPLICAOF", "NO", "ONE")
		s.want(200, s.signIn(email))
	})
	for command, reads := range map[string]int{"hset": 200, "expire": 200, "multi": 200, "ping": 503, "hgetall": 503} {
		t.Run("no "+command, func(t *testing.T) {
			r := ownRedis(t)
			s, email, id := begin(t, r.url())
			redisDo(t, r.url(), "ACL", "SETUSER", "default", "-"+command)
			together(10, func(int) { s.want(reads, id) })
			if command != "hgetall" {
				refused(s, email)
			}
			redisDo(t, r.url(), "ACL", "SETUSER", "default", "+"+command)
			s.want(200, id)
			s.want(200, s.signIn(email))
			r.wantEnds(t)
		})
	}
	t.Run("loading", func(t *testing.T) {
		r := ownRedis(t)
		s, email, id := begin(t, r.url())
		for i := range 300 {
			redisDo(t, r.url(), "SET", "filler:"+strconv.Itoa(i), newUUID()+newUUID()+newUUID(), "EX", 600)
		}
		redisDo(t, r.url(), "SAVE")
		r.kill()
		r.args = []string{"--key-load-delay", "10000", "--loading-process-events-interval-bytes", "1024"}
		r.launch(t)
		refused(s, email)
		s.want(503, id)
		eventually(t, 10*time.Second, "Redis has loaded", func() bool { return s.ask("GET", "/healthz", "").status == 200 })
		s.want(200, id)
		s.want(200, s.signIn(email))
	})
}

// --- Faults: replies out of step

func TestNoAnswerCarriesAnothersSession(t *testing.T) {
	t.Parallel()
	total := rounds(6_000, 100_000)
	stale := struct { // a reply of an earlier exchange, which may be inserted into a later one
		sync.Mutex
		reply []byte
	}{}
	one := func(n int) bool { return rand.N(n) == 0 }
	for name, f := range map[string]func(p *proxy) fault{
		"cut at random": func(*proxy) fault {
			return func(reply []byte) ([]byte, error) {
				if one(200) {
					return reply[:rand.N(len(reply))], errors.New("cut")
				}
				return reply, nil
			}
		},
		"dropped": func(*proxy) fault {
			return func(reply []byte) ([]byte, error) {
				if one(1000) {
					return nil, nil
				}
				return reply, nil
			}
		},
		"repeated": func(*proxy) fault {
			return func(reply []byte) ([]byte, error) {
				if one(20) {
					return append(slices.Clone(reply), reply...), nil
				}
				return reply, nil
			}
		},
		"inserted": func(*proxy) fault {
			return func(reply []byte) ([]byte, error) {
				stale.Lock()
				defer stale.Unlock()
				old := stale.reply
				if reply[0] == '*' {
					stale.reply = slices.Clone(reply)
				}
				if one(20) {
					return append(slices.Clone(old), reply...), nil
				}
				return reply, nil
			}
		},
		"of an earlier batch": func(*proxy) fault {
			var mu sync.Mutex
			earlier := map[int][]byte{} // by length, as the nonces' place would betray another
			return func(reply []byte) ([]byte, error) {
				mu.Lock()
				defer mu.Unlock()
				if isBatch := reply[0] == '*' && bytes.Contains(reply, []byte("\r\n*10")); !isBatch {
					return reply, nil
				}
				if old := earlier[len(reply)]; old != nil && one(4) {
					return old, nil
				}
				earlier[len(reply)] = slices.Clone(reply)
				return reply, nil
			}
		},
		"of an earlier exchange": func(*proxy) fault { // a lookup's reply and its proof
			var mu sync.Mutex
			var earlier, last []byte
			replaced := false
			return func(reply []byte) ([]byte, error) {
				mu.Lock()
				defer mu.Unlock()
				if isBatch := bytes.Contains(reply, []byte("\r\n*10")); isBatch {
					return reply, nil
				}
				if reply[0] == '*' {
					if last = slices.Clone(reply); earlier != nil && one(20) {
						replaced = true
						return nil, nil
					}
				} else if replaced {
					replaced = false
					return earlier, nil
				} else if last != nil {
					earlier, last = append(last, reply...), nil
				}
				return reply, nil
			}
		},
		"swapped": func(*proxy) fault {
			var mu sync.Mutex
			var held []byte
			return func(reply []byte) ([]byte, error) {
				mu.Lock()
				defer mu.Unlock()
				if held != nil {
					both := append(slices.Clone(reply), held...)
					held = nil
					return both, nil
				}
				if one(500) {
					held = slices.Clone(reply)
					return nil, nil
				}
				return reply, nil
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := ownRedis(t)
			p := startProxy(t, "127.0.0.1:"+r.port)
			s := start(t, "REDIS_URL="+p.url())
			s.faulty = true
			const sessions = 200
			store := openRedisSessions(t, r.url())
			ids, users := make([]string, sessions), make([]User, sessions)
			for i := range sessions {
				ids[i], users[i] = newUUID(), testUser(i)
				if err := store.Create(t.Context(), ids[i], "", users[i], time.Hour); err != nil {
					t.Fatal(err)
				}
			}
			var answers, right, away, left, struck atomic.Int64
			bad := f(p)
			p.set(func(reply []byte) ([]byte, error) {
				altered, err := bad(reply)
				if err != nil || !bytes.Equal(altered, reply) {
					struck.Add(1)
				}
				return altered, err
			})
			ask := func(int) {
				for answers.Add(1) <= int64(total) {
					i := rand.N(sessions)
					ctx, cancel := context.WithCancel(t.Context())
					if one(20) { // a client that hangs up
						time.AfterFunc(time.Duration(rand.N(1000))*time.Microsecond, cancel)
					}
					req, _ := http.NewRequestWithContext(ctx, "GET", s.url+"/user", nil)
					req.Header.Set("Cookie", cookieName+"="+ids[i])
					resp, err := s.client.Do(req)
					if err != nil {
						left.Add(1)
						cancel()
						continue
					}
					body, err := io.ReadAll(resp.Body)
					resp.Body.Close()
					cancel()
					switch {
					case err != nil:
						left.Add(1)
					case resp.StatusCode == 200 && string(body) == userJSON(users[i]):
						right.Add(1)
					case resp.StatusCode == 503:
						away.Add(1)
					default:
						t.Errorf("status %d: %s, want %s", resp.StatusCode, body, userJSON(users[i]))
					}
				}
			}
			together(64, ask) // in batches
			answers.Add(int64(-total / 10))
			together(1, ask) // one by one
			t.Logf("%d right, %d times 503, %d left; %d faults", right.Load(), away.Load(), left.Load(), struck.Load())
			if struck.Load() == 0 {
				t.Error("no fault struck")
			}
			if right.Load() < int64(total/10) {
				t.Errorf("only %d of %d answered", right.Load(), total)
			}
			s.truthful(r)
			r.wantEnds(t)
		})
	}
}

// truthful signs in and out over a bad line, and checks each answer against what Redis really holds.
func (s *service) truthful(r *redisServer) {
	s.Helper()
	email := newEmail()
	s.addAccount(email, bcrypt.MinCost)
	for range rounds(20, 300) {
		a := s.ask("POST", "/user/signin", credentials(email, password))
		if a.status == 503 {
			continue
		}
		if a.status != 200 || a.cookie == nil {
			s.Fatalf("POST /user/signin: status %d: %s", a.status, a.body)
		}
		id := a.cookie.Value
		if redisDo(s, r.url(), "EXISTS", "session:"+id).(int64) != 1 {
			s.Error("a cookie for a session that does not exist")
		}
		if a := s.ask("DELETE", "/user/session", "", cookie(id)); a.status == 204 {
			if redisDo(s, r.url(), "EXISTS", "session:"+id).(int64) != 0 {
				s.Error("signed out of a session that still exists")
			}
			for range 3 {
				if a := s.ask("GET", "/user", "", cookie(id)); a.status != 401 && a.status != 503 {
					s.Errorf("a session is back after its end: status %d: %s", a.status, a.body)
				}
			}
		} else if a.status != 503 {
			s.Errorf("DELETE /user/session: status %d", a.status)
		}
	}
}

// --- Faults: crash

func TestACrashLosesNothingThatWasAnswered(t *testing.T) {
	each(t, func(t *testing.T, backend string) {
		path := filepath.Join(t.TempDir(), "users.db")
		type kept struct{ email, id string }
		var mu sync.Mutex
		var all []kept
		registered, signedIn := 0, 0
		for range rounds(3, 50) {
			s := startProcess(t, backend, "DB_PATH="+path)
			deadline := time.Now().Add(time.Duration(200+rand.N(600)) * time.Millisecond)
			killed := make(chan struct{})
			time.AfterFunc(time.Until(deadline), func() { s.faulty = true; s.cmd.Process.Kill(); close(killed) })
			regular := newEmail()
			s.addAccount(regular, bcrypt.MinCost)
			together(8, func(i int) {
				path, email, status, done := "/user/signin", regular, 200, &signedIn
				for {
					if i%2 == 0 {
						path, email, status, done = "/user", newEmail(), 201, &registered
					}
					a, err := s.send("POST", path, credentials(email, password))
					if err != nil {
						return
					}
					if a.status == status {
						mu.Lock()
						all = append(all, kept{email, a.cookie.Value})
						*done++
						mu.Unlock()
					}
				}
			})
			<-killed
			s.stop()
		}
		s := startProcess(t, backend, "DB_PATH="+path)
		for _, k := range all {
			if a := s.want(200, k.id); !strings.Contains(a.body, k.email) {
				t.Errorf("the session of %s is %s", k.email, a.body)
			}
			if s.count(`SELECT count(*) FROM users WHERE email = ?`, k.email) != 1 {
				t.Errorf("the account of %s is lost", k.email)
			}
		}
		s.register(newEmail())
		db := openSQL(t, path)
		defer db.Close()
		var verdict string
		if err := db.QueryRow(`PRAGMA integrity_check`).Scan(&verdict); err != nil || verdict != "ok" {
			t.Errorf("integrity_check: %s, %v", verdict, err)
		}
		t.Logf("%d registrations and %d sign-ins held", registered, signedIn)
	})
}

// --- Faults: SQLite

func TestSQLiteInTrouble(t *testing.T) {
	t.Parallel()
	url := redisURL(t)
	// lock begins a write to the file that does not end.
	lock := func(t *testing.T, path string) (unlock func()) {
		db := openSQL(t, path)
		t.Cleanup(func() { db.Close() })
		db.SetMaxOpenConns(1)
		if _, err := db.Exec(`BEGIN IMMEDIATE`); err != nil {
			t.Fatal(err)
		}
		return func() {
			if _, err := db.Exec(`ROLLBACK`); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Run("locked by another process", func(t *testing.T) {
		s := start(t, "REDIS_URL="+url)
		s.faulty = true
		email := newEmail()
		s.addAccount(email, 10)
		id := s.signIn(email)
		unlock := lock(t, s.dbPath)
		begin := time.Now()
		if a := s.ask("POST", "/user", credentials(newEmail(), password)); a.status != 503 || time.Since(begin) > 3*time.Second {
			t.Errorf("POST /user: status %d after %v, want 503 within 3 s", a.status, time.Since(begin))
		}
		s.want(200, id)
		s.signIn(email) // reads, and writes to Redis only
		unlock()
		s.register(newEmail())
	})
	t.Run("a hash that cannot be stored anew", func(t *testing.T) {
		s := start(t, "REDIS_URL="+url, "BCRYPT_COST=10")
		s.faulty = true
		email := newEmail()
		s.addAccount(email, bcrypt.MinCost)
		unlock := lock(t, s.dbPath)
		s.signIn(email)
		s.log.find(t, "password hash not upgraded")
		unlock()
		s.signIn(email)
		if n := s.count(`SELECT count(*) FROM users WHERE email = ? AND password_hash LIKE '$2a$10$%'`, email); n != 1 {
			t.Error("nor later")
		}
	})
	t.Run("disk full", func(t *testing.T) {
		s := startProcess(t, "REDIS_URL="+url, limitEnv+"=ulimit -f 400") // blocks of 512 or 1,024 bytes
		s.faulty = true
		_, id := s.register(newEmail())
		var last *reply
		for i := 0; i < 100; i++ {
			if last = s.ask("POST", "/user", credentials(newEmail(), password)); last.status != 201 {
				break
			}
		}
		if last.status != 503 {
			t.Errorf("POST /user: status %d, want 503", last.status)
		}
		s.want(200, id)
		accounts := s.count(`SELECT count(*) FROM users`)
		path := s.dbPath
		s.stop()
		s = startProcess(t, "REDIS_URL="+url, "DB_PATH="+path)
		s.register(newEmail())
		if n := s.count(`SELECT count(*) FROM users`); n != accounts+1 {
			t.Errorf("%d accounts, want %d", n, accounts+1)
		}
	})
	t.Run("a file that breaks", func(t *testing.T) {
		s := start(t, "REDIS_URL="+url)
		s.faulty = true
		email := newEmail()
		s.addAccount(email, bcrypt.MinCost)
		id := s.signIn(email)
		s.exec(`PRAGMA wal_checkpoint(TRUNCATE)`)
		if err := os.WriteFile(s.dbPath, bytes.Repeat([]byte("no database "), 10_000), 0o600); err != nil {
			t.Fatal(err)
		}
		for path, body := range map[string]string{"/user/signin": credentials(email, password), "/user": credentials(newEmail(), password)} {
			if a := s.ask("POST", path, body); a.status != 503 {
				t.Errorf("POST %s: status %d, want 503: %s", path, a.status, a.body)
			}
		}
		if a := s.ask("GET", "/healthz", ""); a.status != 503 {
			t.Errorf("GET /healthz: status %d, want 503", a.status)
		}
		s.want(200, id)
	})
	t.Run("a file that is no database", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "users.db")
		os.WriteFile(path, bytes.Repeat([]byte("no database "), 1000), 0o600)
		var stderr strings.Builder
		env := environment(t, []string{"DB_PATH=" + path})
		code := run(t.Context(), nil, func(name string) string { return env[name] }, io.Discard, &stderr)
		if code != 1 || !strings.Contains(stderr.String(), "not a database") || !strings.Contains(stderr.String(), path) {
			t.Errorf("exit status %d: %s", code, &stderr)
		}
	})
}

// --- Faults: clients that misbehave

func TestClientsThatMisbehave(t *testing.T) {
	t.Parallel()
	s := start(t)
	_, id := s.register(newEmail())
	addr := strings.TrimPrefix(s.url, "http://")
	dial := func(t *testing.T) net.Conn {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	t.Run("2,000 idle connections", func(t *testing.T) {
		for range 2000 {
			dial(t)
		}
		s.want(200, id)
	})
	t.Run("what is no request, or two", func(t *testing.T) {
		for _, tt := range []struct {
			text     string
			statuses []int
		}{
			{"GET /user HTTP/1.1\r\n\r\n", []int{400}},
			{"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", []int{400}},
			{"GET /user HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 64<<10) + "\r\n\r\n", []int{431}},
			{"GET /user HTTP/1.1\r\nHost: x\r\nCookie: session-id=" + strings.Repeat("a", 8<<10) + "\r\n\r\n", []int{401}},
			{"POST /user HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\n{}  x", []int{400}},
			{"POST /user HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", []int{400, 501}},
			{"POST /user HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", []int{400, 501}},
			{"GET /user HTTP/1.1\r\nHost: x\r\nCookie: session-id=\x00\xff\r\n\r\n", []int{400, 401}},
			{"GET /user HTTP/1.1\r\nHost : x\r\n\r\n", []int{400}},
		} {
			if status, _, _ := s.raw(tt.text); !slices.Contains(tt.statuses, status) {
				t.Errorf("%.70q: status %d, want %v", tt.text, status, tt.statuses)
			}
		}
		s.want(200, id)
	})
	t.Run("gone at every stage", func(t *testing.T) {
		request := "POST /user HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n" + credentials(newEmail(), password)
		for n := 0; n <= len(request); n += 7 {
			c := dial(t)
			io.WriteString(c, request[:n])
			c.Close()
		}
		together(20, func(int) {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				return
			}
			body := credentials(newEmail(), password)
			fmt.Fprintf(c, "POST /user HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
			c.Close()
		})
		s.want(200, id)
		s.register(newEmail())
	})
	t.Run("one that does not read", func(t *testing.T) {
		s.unread()
		s.want(200, id)
	})
}

// unread connects and sends requests until the service can write no more answers.
func (s *service) unread() net.Conn {
	s.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { c.Close() })
	for {
		c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		if _, err := io.WriteString(c, "GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			return c
		}
	}
}

func TestTheEndComesInTime(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name            string
		signals         int
		atLeast, atMost time.Duration
	}{
		{"of draining", 1, 9 * time.Second, 14 * time.Second},
		{"at a second signal", 2, 0, 5 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := startVariant(t, "main")
			s.faulty = tt.signals > 1 // ended by the signal
			s.unread()
			begin := time.Now()
			stopped := make(chan struct{})
			go func() { s.stop(); close(stopped) }()
			s.log.find(t, "shutting down")
			if tt.signals > 1 {
				eventually(t, 8*time.Second, "the end", func() bool { // the first may still be at work
					s.cmd.Process.Signal(syscall.SIGTERM)
					select {
					case <-stopped:
						return true
					default:
						return false
					}
				})
			}
			<-stopped
			if tt.signals == 1 {
				s.log.find(t, "requests cut off")
			}
			if d := time.Since(begin); d < tt.atLeast || d > tt.atMost {
				t.Errorf("ended after %v, want %v to %v", d, tt.atLeast, tt.atMost)
			}
		})
	}
}

// pipes is a listener of connections within the process, which know the virtual time of a synctest bubble.
type pipes struct {
	conns chan net.Conn
	ended context.Context
	end   context.CancelFunc
}

func (p *pipes) Addr() net.Addr { return &net.TCPAddr{} }
func (p *pipes) Close() error   { p.end(); return nil }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.ended.Done():
		return nil, net.ErrClosed
	}
}

// noticed is a connection that says when it is closed.
type noticed struct {
	net.Conn
	closed chan time.Time
}

func (c *noticed) Close() error {
	select {
	case c.closed <- time.Now():
	default: // not for the first time
	}
	return c.Conn.Close()
}

func TestClientsHaveTheirTime(t *testing.T) {
	body := credentials("nobody@example.com", password)
	head := fmt.Sprintf("POST /user/signin HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n", len(body))
	for name, tt := range map[string]struct {
		sent, slowly string        // at once, then a byte a second
		unread       bool          // by the client
		busy         time.Duration // with another's bcrypt
		cutAfter     time.Duration
		answer       string
	}{
		"for the first byte":   {cutAfter: 5 * time.Second},
		"for headers":          {sent: "GET /user HTTP/1.1\r\nX: ", slowly: strings.Repeat("x", 100), cutAfter: 5 * time.Second},
		"for a body":           {sent: head, slowly: body, cutAfter: 10 * time.Second, answer: "HTTP/1.1 400 "},
		"for idling":           {sent: "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", cutAfter: 2 * time.Minute, answer: "HTTP/1.1 200 "},
		"to read the answer":   {sent: "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", unread: true, cutAfter: 30 * time.Second},
		"for a body and queue": {sent: head + body[:len(body)-9], slowly: body[len(body)-9:], busy: 12 * time.Second, cutAfter: 12*time.Second + 2*time.Minute, answer: "HTTP/1.1 401 "},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, stop := context.WithCancel(t.Context())
				listener := &pipes{conns: make(chan net.Conn)}
				listener.ended, listener.end = context.WithCancel(t.Context())
				log := slog.New(slog.DiscardHandler)
				gate := newGate(1)
				if tt.busy > 0 {
					gate.enter(ctx)
					time.AfterFunc(tt.busy, func() { gate.leave(time.Now()) })
				}
				s := newServer(config{bcryptCost: bcrypt.MinCost}, openTestDatabase(t), &mapSessions{}, gate, new(expvar.Map), log)
				served := make(chan error)
				go func() { served <- serveHTTP(ctx, listener, s, log) }()
				client, server := net.Pipe()
				closed := make(chan time.Time, 1)
				begin := time.Now()
				listener.conns <- &noticed{server, closed}
				go func() {
					io.WriteString(client, tt.sent)
					for _, b := range []byte(tt.slowly) {
						time.Sleep(time.Second)
						client.Write([]byte{b})
					}
				}()
				answer := make(chan []byte, 1)
				if !tt.unread {
					go func() {
						text, _ := io.ReadAll(client)
						answer <- text
					}()
				}
				if d := (<-closed).Sub(begin); d < tt.cutAfter || d > tt.cutAfter+time.Second {
					t.Errorf("cut after %v, want %v", d, tt.cutAfter)
				}
				if !tt.unread {
					if text := <-answer; !bytes.HasPrefix(text, []byte(tt.answer)) {
						t.Errorf("answer %q, want %q", text, tt.answer)
					}
				}
				client.Close()
				stop()
				if synctest.Wait(); listener.ended.Err() == nil {
					t.Error("told to stop, it accepts connections")
				}
				if err := <-served; err != nil {
					t.Error(err)
				}
				time.Sleep(time.Hour) // whatever has not ended does
			})
		})
	}
}

const limitEnv = "TEST_LIMIT" // a shell command that limits the process

func TestMoreConnectionsThanFileDescriptors(t *testing.T) {
	t.Parallel()
	s := startProcess(t, limitEnv+"=ulimit -n 60")
	s.faulty = true
	_, id := s.register(newEmail())
	var conns []net.Conn
	for range 200 {
		c, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	s.want(200, id) // on the connection it had
	for _, c := range conns {
		c.Close()
	}
	s.client.CloseIdleConnections()
	s.want(200, id)
	s.register(newEmail())
}

// --- Faults: guessing

func TestGuessing(t *testing.T) {
	t.Parallel()
	s := startProcess(t, "DEBUG_ADDR=127.0.0.1:0", "TRUSTED_PROXIES=127.0.0.0/8")
	email := newEmail()
	s.addAccount(email, bcrypt.MinCost)
	open := s.signIn(email)
	tries := rounds(300, 10_000)
	guess := func(from func(i int) string) (refused, throttled int64) {
		var next, r, th atomic.Int64
		together(8, func(int) {
			for i := next.Add(1); i <= int64(tries); i = next.Add(1) {
				switch a := s.ask("POST", "/user/signin", credentials(email, "guess"+strconv.Itoa(int(i))), "X-Forwarded-For: "+from(int(i))); a.status {
				case 401:
					r.Add(1)
				case 429:
					th.Add(1)
				default:
					t.Errorf("status %d: %s", a.status, a.body)
				}
			}
		})
		return r.Load(), th.Load()
	}
	begin := time.Now()
	rounds := s.metric("bcryptRounds")
	one, _ := guess(func(int) string { return "192.0.2.1" })
	minutes := int64(time.Since(begin)/time.Minute) + 1
	if one < 10 || one > 10+minutes {
		t.Errorf("from one address: %d of %d guesses were tried, want 10 and one a minute", one, tries)
	}
	many, throttled := guess(func(i int) string { return fmt.Sprintf("198.51.%d.%d", i>>8, i&255) })
	minutes = int64(time.Since(begin)/time.Minute) + 1
	if many < 85 || many > 100+10*minutes {
		t.Errorf("from everywhere: %d of %d guesses were tried, want 100 and ten a minute", many, tries)
	}
	if spent, want := s.metric("bcryptRounds")-rounds, float64((one+many)<<bcrypt.MinCost); spent != want {
		t.Errorf("%v rounds of bcrypt were spent, want %v: a refused try costs none", spent, want)
	}
	s.want(200, open)
	t.Logf("one address: %d tried; everywhere: %d tried, %d refused", one, many, throttled)
}

// --- Faults: rolling out and failing over

func TestTwoInstancesOnOneRedis(t *testing.T) {
	t.Parallel()
	url := redisURL(t)
	a, b := start(t, "REDIS_URL="+url), start(t, "REDIS_URL="+url)
	user, id := a.register(newEmail())
	if got := b.want(200, id); got.body != userJSON(user) {
		t.Errorf("the other one answers %s", got.body)
	}
	b.ask("DELETE", "/user/session", "", cookie(id))
	a.want(401, id)
}

func TestRollingOutLosesNoRequest(t *testing.T) {
	t.Parallel()
	for range rounds(2, 20) {
		s := startVariant(t, "main", "REDIS_URL="+redisURL(t), "BCRYPT_COST=10")
		_, id := s.register(newEmail())
		var answered, lost atomic.Int64
		var ready sync.WaitGroup
		ready.Add(32)
		go func() {
			ready.Wait()
			s.stop()
		}()
		together(32, func(int) {
			client := newClient() // with a connection of its own
			for i := 0; ; i++ {
				req, _ := http.NewRequest("GET", s.url+"/user", nil)
				req.Header.Set("Cookie", cookieName+"="+id)
				resp, err := client.Do(req)
				if i == 20 {
					ready.Done()
				}
				if err != nil {
					lost.Add(1) // a connection answered its last request with Connection: close, so this is a new one
					return
				}
				io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				if answered.Add(1); resp.StatusCode != 200 {
					t.Errorf("status %d", resp.StatusCode)
				}
				if resp.Close {
					return
				}
			}
		})
		if lost.Load() > 0 {
			t.Errorf("%d requests on open connections were lost, %d answered", lost.Load(), answered.Load())
		}
		s.stop()
	}
}

func TestSentinelsNameThePrimary(t *testing.T) {
	t.Parallel()
	primary, replica := ownRedis(t), ownRedis(t)
	redisDo(t, replica.url(), "REPLICAOF", "127.0.0.1", primary.port)
	var addrs []string
	for range 3 {
		port, dir := freePort(t), t.TempDir()
		conf := filepath.Join(dir, "sentinel.conf")
		text := fmt.Sprintf("port %s\nbind 127.0.0.1\ndir %s\nsentinel monitor accounts 127.0.0.1 %s 2\n"+
			"sentinel down-after-milliseconds accounts 500\nsentinel failover-timeout accounts 3000\n", port, dir, primary.port)
		if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		sentinel := launchRedis(t, dir, port, "--sentinel", conf)
		t.Cleanup(sentinel.kill)
		addrs = append(addrs, "127.0.0.1:"+port)
	}
	sentinel := "redis://" + addrs[0]
	for _, addr := range addrs {
		eventually(t, 20*time.Second, "the sentinels know each other and the replica", func() bool {
			info, _ := redis.String(redisDo(t, "redis://"+addr, "INFO", "sentinel"), nil)
			return strings.Contains(info, "slaves=1,sentinels=3")
		})
	}
	s := start(t, "REDIS_URL=redis-sentinel://127.0.0.1:"+freePort(t)+","+strings.Join(addrs, ",")+"/accounts/0")
	s.faulty = true
	email := newEmail()
	s.addAccount(email, bcrypt.MinCost)
	ids := make([]string, 50)
	for i := range ids {
		ids[i] = s.signIn(email)
	}
	redisDo(t, primary.url(), "WAIT", 1, 5000)
	primary.kill()
	killed := time.Now()
	var elected, back time.Duration
	statuses := map[int]int{}
	for back == 0 && time.Since(killed) < 30*time.Second {
		a := s.ask("GET", "/user", "", cookie(ids[rand.N(len(ids))]))
		statuses[a.status]++
		if elected == 0 {
			addr, _ := redis.Strings(redisDo(t, sentinel, "SENTINEL", "get-master-addr-by-name", "accounts"), nil)
			if len(addr) == 2 && addr[1] == replica.port {
				elected = time.Since(killed)
			}
		}
		if elected > 0 && a.status == 200 {
			back = time.Since(killed)
		}
	}
	if len(statuses) != 2 || statuses[200] == 0 || statuses[503] == 0 {
		t.Errorf("answers by status: %v, want 200 and 503 only", statuses)
	}
	if back == 0 || back-elected > 2*time.Second {
		t.Errorf("elected after %v, back after %v, want 2 s later at most", elected, back)
	}
	for _, id := range ids {
		s.want(200, id)
	}
	s.want(200, s.signIn(email))
	t.Logf("elected after %v, back %v later; answers by status: %v", elected, back-elected, statuses)
}

func TestASentinelThatKnowsLessIsPassedOver(t *testing.T) {
	primary, replica := ownRedis(t), ownRedis(t)
	redisDo(t, replica.url(), "REPLICAOF", "127.0.0.1", primary.port)
	sentinel := func(answer string) (addr string) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				c.Read(make([]byte, 1000))
				io.WriteString(c, answer)
				c.Close()
			}
		}()
		return l.Addr().String()
	}
	at := func(port string) string {
		return fmt.Sprintf("*2\r\n$9\r\n127.0.0.1\r\n$%d\r\n%s\r\n", len(port), port)
	}
	hasNotHeard, knowsNone, refuses := sentinel(at(replica.port)), sentinel("*-1\r\n"), sentinel("-NOAUTH\r\n")
	behind := "redis-sentinel://" + strings.Join([]string{hasNotHeard, knowsNone, refuses}, ",")
	target, _ := parseRedisURL(behind + "/accounts")
	store := newRedisSessions(target, new(expvar.Map))
	if err := store.Ping(t.Context()); !errors.Is(err, errUnavailable) || strings.Count(err.Error(), "primary") != 3 {
		t.Errorf("no sentinel knows the primary: %v", err)
	}
	store = openRedisSessions(t, behind+","+sentinel(at(primary.port))+"/accounts")
	if err := store.Delete(t.Context(), newUUID()); err != nil {
		t.Errorf("the last sentinel knows it: %v", err)
	}
}

func TestRedisOverTLSWithAPrivateCA(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cert, key := certificate(t, dir)
	tlsPort := freePort(t)
	ownRedis(t, "--tls-port", tlsPort, "--tls-cert-file", cert, "--tls-key-file", key, "--tls-auth-clients", "no")
	s := startProcess(t, "REDIS_URL=rediss://localhost:"+tlsPort, "SSL_CERT_FILE="+cert)
	_, id := s.register(newEmail())
	s.want(200, id)
	other := startProcess(t, "REDIS_URL=rediss://localhost:"+tlsPort) // does not know the CA
	other.faulty = true
	if a := other.ask("GET", "/user", "", cookie(id)); a.status != 503 {
		t.Errorf("over a certificate that nobody vouches for: status %d, want 503", a.status)
	}
	if line := other.log.find(t, "store out of reach"); !strings.Contains(line["err"].(string), "certificate") {
		t.Errorf("log line %v, want the cause", line)
	}
}

// certificate makes a self-signed certificate for localhost.
func certificate(t *testing.T, dir string) (certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(crand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for file, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: cert}, keyFile: {Type: "PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certFile, keyFile
}

// TestMovingOver runs the README's own statements on a file as Prisma writes it, and serves a session as
// ioredis writes one.
func TestMovingOver(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, statements, _ := strings.Cut(string(readme), "sqlite3 users.db <<'SQL'\n")
	statements, _, found := strings.Cut(statements, "\nSQL\n")
	if !found {
		t.Fatal("README.md has no block for sqlite3")
	}
	url := redisURL(t)
	s := start(t, "REDIS_URL="+url)
	dev := filepath.Join(t.TempDir(), "dev.db")
	old := openSQL(t, dev)
	defer old.Close()
	hash, _ := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	hash[2] = 'b'
	if _, err := old.Exec(`CREATE TABLE "User" ("id" TEXT NOT NULL PRIMARY KEY, "name" TEXT NOT NULL, "email" TEXT NOT NULL, "password" TEXT NOT NULL,
		"createdAt" DATETIME NOT NULL DEFAULT CURRENT_TIMESTAMP, "updateAt" DATETIME NOT NULL);
		CREATE UNIQUE INDEX "User_email_key" ON "User"("email");
		INSERT INTO "User" VALUES ('cm1', 'Ada', 'Ada@Example.com', ?1, 1743364800123, 1743364800123),
			('cm2', 'Bob', 'bob@example.com', ?1, '2025-03-30T20:00:00.000+00:00', '2025-03-30 20:00:00'),
			('cm3', 'Ada too', 'ada@example.com', ?1, 1743364900000, 1743364900000)`, string(hash)); err != nil {
		t.Fatal(err)
	}
	db := openSQL(t, s.dbPath)
	defer db.Close()
	db.SetMaxOpenConns(1)
	statements = strings.Replace(statements, "'dev.db'", "'"+dev+"'", 1)
	move, report, _ := strings.Cut(statements, "SELECT 'not moved")
	var left string
	if _, err := db.Exec(move); err != nil {
		t.Fatal(err)
	}
	if err := db.QueryRow("SELECT 'not moved" + report).Scan(&left); err != nil || !strings.HasSuffix(left, ": cm3 ada@example.com") {
		t.Errorf("reported %q, %v, want the account whose email differs in case only", left, err)
	}
	for email, want := range map[string]User{
		"ada@example.com": {"cm1", "Ada", "ada@example.com", "2025-03-30T20:00:00.123Z", "2025-03-30T20:00:00.123Z"},
		"bob@example.com": {"cm2", "Bob", "bob@example.com", "2025-03-30T20:00:00.000Z", "2025-03-30T20:00:00.000Z"},
	} {
		if a := s.want(200, s.signIn(email)); a.body != userJSON(want) {
			t.Errorf("got %s, want %s", a.body, userJSON(want))
		}
	}
	// The Express app reads each field of the hash as a string, and takes createdAt with new Date(text).
	id := newUUID()
	redisDo(t, url, "HSET", "session:"+id, "id", "cm1", "name", "Ada", "email", "ada@example.com",
		"createdAt", "Sun Mar 30 2025 20:00:00 GMT+0000 (Coordinated Universal Time)", "updatedAt", "Sun Mar 30 2025 20:00:00 GMT+0000 (Coordinated Universal Time)")
	redisDo(t, url, "EXPIRE", "session:"+id, 604800)
	s.want(200, id)
}

// ---------------------------------------------------------------------------------------------------
// Fuzzing: what comes from outside, and what must hold of it whatever it is.

func FuzzBody(f *testing.F) {
	for _, body := range []string{
		`{"name":"Ada","email":"ada@example.com","password":"correct horse"}`, `{"email":"a@b","password":null}`, `{}`, `null`, `[]`, `{"a":{"b":[1,2,{}]}}`,
		`{"email":"Ada <a@b>","name":"\ud800","password":"\u0000"}`, `{"email":"a@b","email":"c@d"}`, "{\"name\":\"\xff\"}", `{"x":1e999}`, ``, `{"name":"x"} `,
	} {
		f.Add("application/json", body)
	}
	f.Add("application/json; charset=utf-8", `{"name":""}`)
	f.Add("text/plain;", `{}`)
	f.Fuzz(func(t *testing.T, contentType, body string) {
		r, err := http.NewRequest("POST", "/user", strings.NewReader(body))
		if err != nil {
			t.Skip()
		}
		r.Header.Set("Content-Type", contentType)
		form, err := readForm(&recorder{header: http.Header{}}, r, true, "name", "email", "password")
		if p := new(problem); err != nil {
			if !errors.As(err, &p) || p.Status < 400 || p.Status > 499 || form != nil {
				t.Fatalf("%q: %v, %v", body, form, err)
			}
			return
		}
		name, email, password := form["name"], form["email"], form["password"]
		if n := utf8.RuneCountInString(name); n < 1 || n > 100 || strings.TrimSpace(name) != name || strings.ContainsAny(name, "\r\n\x00") {
			t.Errorf("name %q", name)
		}
		if email != strings.ToLower(email) || !strings.Contains(email, "@") || len(email) > 254 || strings.ContainsAny(email, "\r\n <>,\x00") && !strings.HasPrefix(email, `"`) {
			t.Errorf("email %q", email)
		}
		if len(password) < 8 || len(password) > 72 || !utf8.ValidString(name+email+password) {
			t.Errorf("password %q", password)
		}
		for field, text := range form { // what was accepted is accepted again, unchanged
			if again, complaint := normalize(field, text); complaint != "" || again != text {
				t.Errorf("%s %q becomes %q: %s", field, text, again, complaint)
			}
		}
	})
}

func FuzzCookie(f *testing.F) {
	id := newUUID()
	for _, cookie := range []string{"session-id=" + id, `session-id="` + id + `"`, "a=b; session-id=" + id + "; c", "session-id=", "session-id=" + id[:35], "SESSION-ID=" + id,
		"session-id=x; session-id=" + id, "session-id=00000000-0000-0000-0000-000000000000", strings.Repeat("a=b;", 1000), "session-id=\x00\xff"} {
		f.Add(cookie)
	}
	form := regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)
	f.Fuzz(func(t *testing.T, cookie string) {
		id := sessionID(&http.Request{Header: http.Header{"Cookie": {cookie}}})
		if id != "" && (!form.MatchString(id) || !strings.Contains(cookie, id)) {
			t.Errorf("%q: session id %q", cookie, id)
		}
		if isUUID(cookie) != form.MatchString(cookie) {
			t.Errorf("isUUID(%q) is %v", cookie, isUUID(cookie))
		}
	})
}

func FuzzSessionHash(f *testing.F) {
	f.Add("id", "7", "createdAt", "2025-03-30T20:00:00.000Z", "updatedAt", "Sun Mar 30 2025 20:00:00 GMT+0000 (Coordinated Universal Time)")
	f.Add("id", "", "createdAt", "0000-01-01T00:00:00+23:59", "updatedAt", "9999-12-31T23:59:59.999-23:59")
	f.Add("name", "\xff", "updatedAt", "Invalid Date", "email", "1743364800000")
	form := regexp.MustCompile(`^-?\d{4,5}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$`)
	f.Fuzz(func(t *testing.T, k1, v1, k2, v2, k3, v3 string) {
		var reply []any
		for _, text := range []string{k1, v1, k2, v2, k3, v3} {
			reply = append(reply, []byte(text))
		}
		user, err := userOfHash(reply, nil)
		if err != nil && (!errors.Is(err, errNoSession) || user != User{}) {
			t.Errorf("%q: %v, %v", reply, user, err)
		}
		if err == nil && (user.ID == "" || !form.MatchString(user.CreatedAt) || !form.MatchString(user.UpdatedAt)) {
			t.Errorf("%q: %+v", reply, user)
		}
	})
}

func FuzzForwardedFor(f *testing.F) {
	for _, header := range []string{"", "192.0.2.1", "203.0.113.9, 10.0.0.1", "::1,fe80::1%eth0", ",,,", "10.0.0.1:80", "unknown", "[::1]", " 10.0.0.1 ,\t10.0.0.2", "::ffff:10.0.0.1"} {
		f.Add(header, "10.0.0.1:1")
		f.Add(header, "192.0.2.7:1")
	}
	s := &server{cfg: config{trustedProxies: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}}
	f.Fuzz(func(t *testing.T, header, peer string) {
		addr, err := netip.ParseAddrPort(peer)
		if err != nil {
			t.Skip()
		}
		got := s.clientAddr(&http.Request{RemoteAddr: peer, Header: http.Header{"X-Forwarded-For": {header}}})
		if !got.IsValid() || got.Zone() != "" || got.Is4In6() {
			t.Errorf("%q of %s: %v", header, peer, got)
		}
		if direct := addr.Addr().Unmap().WithZone(""); !s.cfg.trustedProxies[0].Contains(direct) && got != direct {
			t.Errorf("%q of %s, which nobody trusts: %v", header, peer, got)
		}
	})
}

// answeringConn is a connection that answers with fixed bytes.
type answeringConn struct {
	net.Conn
	answer io.Reader
}

func (c *answeringConn) Read(p []byte) (int, error)       { return c.answer.Read(p) }
func (c *answeringConn) Write(p []byte) (int, error)      { return len(p), nil }
func (c *answeringConn) SetReadDeadline(time.Time) error  { return nil }
func (c *answeringConn) SetWriteDeadline(time.Time) error { return nil }
func (c *answeringConn) Close() error                     { return nil }

func FuzzReplies(f *testing.F) {
	for _, text := range []string{"+OK\r\n+QUEUED\r\n*1\r\n$1\r\nx\r\n", "*-1\r\n$-1\r\n:1\r\n-ERR x\r\n", "$99999999999\r\n", "*99999999999\r\n",
		strings.Repeat("*1\r\n", 300_000), "*1000000\r\n*1000000\r\n*1000000\r\n", "$0\r\n\r\n", "$5\r\n*999\r\n", "\r\n", "$x\r\n"} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		guarded := &guardedConn{Conn: &answeringConn{answer: bytes.NewReader(text)}}
		c := redis.NewConn(guarded, 0, 0)
		c.Send("PING")
		c.Send("PING")
		c.Do("")
		if runtime.ReadMemStats(&after); after.TotalAlloc-before.TotalAlloc > 4*maxReplies+uint64(100*len(text)) {
			t.Errorf("%q: %d MB", text, (after.TotalAlloc-before.TotalAlloc)>>20)
		}
	})
}

// ---------------------------------------------------------------------------------------------------
// Benchmarks. Each prints its ratio to a baseline that is measured in the same run, turn by turn. Servers
// are processes of their own, so that the client shares nothing with them.

// runVariant is what the test binary does as a process other than the program itself.
func runVariant(variant string) int {
	if variant == "cheap" {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		return runCheaply(ctx, os.Getenv, os.Stderr)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	log := slog.New(slog.NewJSONHandler(os.Stderr, nil))
	log.Info("listening", "addr", listener.Addr().String())
	switch variant {
	case "bare":
		body := []byte(os.Getenv("BODY"))
		http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Cache-Control", "no-store")
			w.Header().Set("X-Content-Type-Options", "nosniff")
			w.Header().Set("Content-Type", "application/json")
			w.Write(body)
		}))
	case "pooled":
		tuneRuntime(os.Getenv)
		s := newServer(config{}, nil, newPooledSessions(os.Getenv("REDIS_URL")), newGate(1), new(expvar.Map), log)
		serveHTTP(context.Background(), listener, s, log)
	}
	return 0
}

// pooledSessions is the usual way to read a session: a connection from a pool for each lookup.
type pooledSessions struct {
	mapSessions
	pool *redis.Pool
}

func newPooledSessions(url string) *pooledSessions {
	return &pooledSessions{pool: &redis.Pool{MaxIdle: 64, MaxActive: 64, Wait: true, Dial: func() (redis.Conn, error) { return redis.DialURL(url) }}}
}

func (s *pooledSessions) Get(_ context.Context, id string) (User, error) {
	c := s.pool.Get()
	defer c.Close()
	return userOfHash(c.Do("HGETALL", sessionKey(id)))
}

// target is a server and the bytes of a request for it.
type target struct {
	conns   []net.Conn
	request []byte
	length  int // of an answer
}

// newTarget connects n times. Every answer must be a 200 as long as the first one.
func newTarget(b *testing.B, n int, url, id string) *target {
	b.Helper()
	addr := strings.TrimPrefix(url, "http://")
	tg := &target{request: []byte("GET /user HTTP/1.1\r\nHost: " + addr + "\r\nCookie: session-id=" + id + "\r\n\r\n")}
	for range n {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { c.Close() })
		tg.conns = append(tg.conns, c)
	}
	tg.conns[0].Write(tg.request)
	var seen bytes.Buffer
	resp, err := http.ReadResponse(bufio.NewReaderSize(io.TeeReader(tg.conns[0], &seen), 16), nil)
	if err != nil || resp.StatusCode != 200 {
		b.Fatalf("GET /user: %v, %v", resp, err)
	}
	body, _ := io.ReadAll(resp.Body)
	tg.length = seen.Len()
	if len(body) == 0 || !bytes.HasSuffix(seen.Bytes(), body) {
		b.Fatalf("an answer of %d bytes: %q", tg.length, seen.String())
	}
	return tg
}

// load sends n requests over all connections and returns how long it took, and each request.
func (tg *target) load(b *testing.B, n int) (time.Duration, []time.Duration) {
	b.Helper()
	latencies := make([][]time.Duration, len(tg.conns))
	var left atomic.Int64
	left.Store(int64(n))
	begin := time.Now()
	together(len(tg.conns), func(i int) {
		answer := make([]byte, tg.length)
		for left.Add(-1) >= 0 {
			sent := time.Now()
			tg.conns[i].Write(tg.request)
			if _, err := io.ReadFull(tg.conns[i], answer); err != nil || !bytes.HasPrefix(answer, []byte("HTTP/1.1 200")) {
				b.Errorf("GET /user: %.80q, %v", answer, err)
				return
			}
			latencies[i] = append(latencies[i], time.Since(sent))
		}
	})
	took := time.Since(begin)
	all := slices.Concat(latencies...)
	slices.Sort(all)
	return took, all
}

func quantile[T any](sorted []T, q float64) T { return sorted[int(q*float64(len(sorted)-1))] }

func median(values []float64) float64 { slices.Sort(values); return quantile(values, 0.5) }

// compare loads subject and baseline in turns and reports medians: requests a second, their ratio, and the
// ratio of the median latencies.
func compare(b *testing.B, subject, baseline *target, name string) {
	const turn = 5000
	var rates, ratios, latencies []float64
	b.ResetTimer()
	for done := 0; done < b.N; done += turn {
		n := min(turn, b.N-done)
		base, baseAll := baseline.load(b, n)
		took, all := subject.load(b, n)
		rates = append(rates, float64(n)/took.Seconds())
		ratios = append(ratios, base.Seconds()/took.Seconds())
		latencies = append(latencies, float64(quantile(all, 0.5))/float64(max(1, quantile(baseAll, 0.5))))
	}
	b.ReportMetric(median(rates), "req/s")
	b.ReportMetric(median(ratios), "rate/"+name)
	b.ReportMetric(median(latencies), "p50/"+name)
}

// processor returns the CPU time that a process has used, 0 where the system does not say.
func processor(pid int) time.Duration {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, text, _ = bytes.Cut(text, []byte(") "))
	fields := strings.Fields(string(text))
	if len(fields) < 13 {
		return 0
	}
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	return time.Duration(user+system) * 10 * time.Millisecond
}

func BenchmarkUser(b *testing.B) {
	const clients = 64
	bare := func(b *testing.B, s *service, id string) *target {
		return newTarget(b, clients, startVariant(b, "bare", "BODY="+s.want(200, id).body).url, id)
	}
	b.Run("redis", func(b *testing.B) {
		r := ownRedis(b)
		s := startVariant(b, "main", "REDIS_URL="+r.url())
		_, id := s.register(newEmail())
		before := processor(r.cmd.Process.Pid)
		compare(b, newTarget(b, clients, s.url, id), bare(b, s, id), "bare")
		b.ReportMetric(float64((processor(r.cmd.Process.Pid)-before).Microseconds())/float64(b.N), "redis-µs/req")
	})
	b.Run("redis+1ms", func(b *testing.B) {
		url := "redis://" + delayed(b, strings.TrimPrefix(redisURL(b), "redis://"), time.Millisecond)
		s := startVariant(b, "main", "REDIS_URL="+url)
		_, id := s.register(newEmail())
		compare(b, newTarget(b, clients, s.url, id), newTarget(b, clients, startVariant(b, "pooled", "REDIS_URL="+url).url, id), "pooled")
	})
	b.Run("pooled", func(b *testing.B) { // what batching is worth
		s := startVariant(b, "main", "REDIS_URL="+redisURL(b))
		_, id := s.register(newEmail())
		compare(b, newTarget(b, clients, s.url, id), newTarget(b, clients, startVariant(b, "pooled", "REDIS_URL="+redisURL(b)).url, id), "pooled")
	})
	b.Run("sqlite", func(b *testing.B) {
		s := startVariant(b, "main")
		_, id := s.register(newEmail())
		compare(b, newTarget(b, clients, s.url, id), bare(b, s, id), "bare")
	})
}

func BenchmarkSignIn(b *testing.B) {
	s := startVariant(b, "main", "REDIS_URL="+redisURL(b), "BCRYPT_COST=10")
	email := newEmail()
	s.addAccount(email, 10)
	hash, _ := bcrypt.GenerateFromPassword([]byte(password), 10)
	var ratios, rates []float64
	b.ResetTimer()
	for done := 0; done < b.N; {
		n := min(40, b.N-done)
		done += n
		turn := func(clients int, f func()) time.Duration {
			var left atomic.Int64
			left.Store(int64(n))
			begin := time.Now()
			together(clients, func(int) {
				for left.Add(-1) >= 0 {
					f()
				}
			})
			return time.Since(begin)
		}
		alone := turn(runtime.NumCPU(), func() { bcrypt.CompareHashAndPassword(hash, []byte(password)) })
		took := turn(2*runtime.NumCPU(), func() { s.signIn(email) })
		ratios = append(ratios, alone.Seconds()/took.Seconds())
		rates = append(rates, float64(n)/took.Seconds())
	}
	b.ReportMetric(median(rates), "sign-ins/s")
	b.ReportMetric(median(ratios), "rate/bcrypt")
}

// BenchmarkUserDuringSignIns shows what GET /user has to bear while 64 clients sign in without pause.
func BenchmarkUserDuringSignIns(b *testing.B) {
	s := startVariant(b, "main", "REDIS_URL="+redisURL(b), "BCRYPT_COST=12")
	email := newEmail()
	s.addAccount(email, 12)
	tg := newTarget(b, 8, s.url, s.signIn(email))
	quiet, quietAll := tg.load(b, max(b.N, 100))
	ctx, stop := context.WithCancel(b.Context())
	var storm sync.WaitGroup
	var slowest, signIns, refused atomic.Int64
	for range 64 {
		storm.Go(func() {
			for ctx.Err() == nil {
				begin := time.Now()
				if a := s.ask("POST", "/user/signin", credentials(email, password)); a.status == 503 {
					refused.Add(1)
				} else {
					signIns.Add(1)
				}
				raise(&slowest, time.Since(begin))
			}
		})
	}
	eventually(b, 10*time.Second, "the storm", func() bool { return signIns.Load() > 0 })
	begin, before := time.Now(), signIns.Load()
	b.ResetTimer()
	busy, busyAll := tg.load(b, max(b.N, 100))
	b.StopTimer()
	b.ReportMetric(float64(signIns.Load()-before)/time.Since(begin).Seconds(), "sign-ins/s")
	stop()
	storm.Wait()
	b.ReportMetric(float64(quantile(busyAll, 0.99).Microseconds())/1000, "p99-ms")
	b.ReportMetric(float64(quantile(busyAll, 0.99))/float64(quantile(quietAll, 0.99)), "p99/quiet")
	b.ReportMetric(quiet.Seconds()/busy.Seconds(), "rate/quiet")
	b.ReportMetric(time.Duration(slowest.Load()).Seconds(), "slowest-sign-in-s")
}

// BenchmarkGrowth compares a thousand sessions and accounts with a million: SESSION_STORAGE_LONG=1.
func BenchmarkGrowth(b *testing.B) {
	if !long {
		b.Skip("SESSION_STORAGE_LONG=1 makes a million of each")
	}
	for _, backend := range []string{"redis", "sqlite"} {
		b.Run(backend, func(b *testing.B) {
			var connect []func() *target // at the end: a connection without a request is cut after 5 s
			for _, n := range []int{1_000, 1_000_000} {
				vars := []string{}
				if backend == "redis" {
					r := ownRedis(b)
					vars = append(vars, "REDIS_URL="+r.url())
					c, _ := redis.DialURL(r.url())
					for i := range n {
						u := testUser(i)
						c.Send("HSET", sessionKey(newUUID()), "id", u.ID, "name", u.Name, "email", u.Email, "createdAt", u.CreatedAt, "updatedAt", u.UpdatedAt)
						if i%1000 == 999 {
							c.Do("")
						}
					}
					c.Close()
				}
				s := startVariant(b, "main", vars...)
				_, id := s.register(newEmail())
				db := openSQL(b, s.dbPath)
				if backend == "sqlite" {
					_, err := db.Exec(`WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < ?)
						INSERT INTO sessions SELECT randomblob(32), hex(randomblob(16)), 'Ada Lovelace', i || '@example.com', '2025-03-30T20:00:00.000Z', '2025-03-30T20:00:00.000Z', 4000000000000 FROM n`, n)
					if err != nil {
						b.Fatal(err)
					}
				}
				db.Close()
				connect = append(connect, func() *target { return newTarget(b, 64, s.url, id) })
			}
			compare(b, connect[1](), connect[0](), "thousand")
		})
	}
	b.Run("accounts", func(b *testing.B) {
		var dbs []*database
		for _, n := range []int{1_000, 1_000_000} {
			db := openTestDatabase(b)
			_, err := db.writer.Exec(`WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < ?)
				INSERT INTO users SELECT hex(randomblob(16)), 'Ada Lovelace', i || '@example.com', 'hash', '2025-03-30T20:00:00.000Z', '2025-03-30T20:00:00.000Z' FROM n`, n)
			if err != nil {
				b.Fatal(err)
			}
			dbs = append(dbs, db)
		}
		hash, _ := bcrypt.GenerateFromPassword([]byte(password), 10)
		var ratios []float64
		b.ResetTimer()
		for range b.N {
			var took [2]time.Duration
			for i, db := range dbs {
				begin := time.Now()
				if _, _, err := db.UserByEmail(b.Context(), fmt.Sprintf("%d@example.com", 1+rand.N(1000))); err != nil {
					b.Fatal(err)
				}
				bcrypt.CompareHashAndPassword(hash, []byte(password))
				took[i] = time.Since(begin)
			}
			ratios = append(ratios, took[0].Seconds()/took[1].Seconds())
		}
		b.ReportMetric(median(ratios), "rate/thousand")
	})
}
