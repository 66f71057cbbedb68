// What shows that the service does what README promises: a real server over TCP, real SQLite files, a real
// Redis. Under lines of dashes stand first the harness, and then sections that are named for the headings of
// README, in its order. Search for "// Redis: TLS", say.
//
//	Harness              Redis servers; the service, in this process or in one of its own; asking it;
//	                     accounts, past the service; a unit of the service; sessions in a fake Redis;
//	                     time and chance
//	The API              requests and answers; sessions and cookies; connections
//	Behind a proxy
//	Configuration
//	Redis                what it is sent; replies that are believed; connecting; away, or refusing;
//	                     Sentinel; a cluster; TLS
//	Operating            what the log says; stopping and upgrading; the account file; the account file while
//	                     the service runs; metrics
//	Limits and security  what is counted; the queue for bcrypt; passwords
//	Speed                benchmarks
//	Moving over          from the Express app, and back
//	The code             what another session backend has to pass
//
// checkReply and checkLog look at every answer and at every log.

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	cryptorand "crypto/rand"
	"crypto/x509"
	"database/sql"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
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
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/gomodule/redigo/redis"
	"golang.org/x/crypto/bcrypt"
)

// ---------------------------------------------------------------------------------------------------
// Harness: Redis servers.

const (
	programEnv = "SESSION_STORAGE_TEST_IS_PROGRAM" // set: the test binary is the program itself
	beforeEnv  = "SESSION_STORAGE_TEST_BEFORE"     // a shell command before the program, such as ulimit -n 60
)

func TestMain(m *testing.M) {
	if os.Getenv(programEnv) != "" {
		main()
		os.Exit(1) // should main return: or this process would run the tests, and those would start it again
	}
	claimPorts()
	flag.Set("test.parallel", "8") // most tests wait; the command line may say otherwise
	flag.Parse()
	if flag.Lookup("test.bench").Value.String() == "" {
		runtime.GOMAXPROCS(4 * runtime.NumCPU()) // so that bcrypt does not keep others from answering in time
	}
	go measureStalls()
	keepFilesInMemory()
	code := m.Run()
	if sharedRedis.host != nil {
		sharedRedis.host.stop()
	}
	if n := redisSkips.Load(); n > 0 {
		fmt.Printf("%d TESTS SKIPPED FOR WANT OF A REDIS: %s\n", n, howToGetRedis)
	}
	os.Exit(code)
}

// keepFilesInMemory puts what t.TempDir makes where no disk is waited for. Other programs may keep a disk
// busy for longer than a request has.
func keepFilesInMemory() {
	const memory = "/dev/shm"
	var fs syscall.Statfs_t
	if os.Getenv("TMPDIR") == "" && syscall.Statfs(memory, &fs) == nil && fs.Bavail*uint64(fs.Bsize) > 1<<30 {
		os.Setenv("TMPDIR", memory)
	}
}

const howToGetRedis = "install redis-server, or start Docker, or set REDIS_URL for tests that break none"

var redisSkips atomic.Int64

// skipRedis skips a test that needs a Redis, or fails it where nothing may be skipped.
func skipRedis(t testing.TB) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatal("CI is set and there is no Redis: " + howToGetRedis)
	}
	redisSkips.Add(1)
	t.Skip("no Redis: " + howToGetRedis)
}

// sharedRedis is the Redis of all tests that do not break theirs. Their keys are random, so that they do
// not meet, nor whatever else a Redis named by REDIS_URL holds.
var sharedRedis struct {
	sync.Once
	host *redisHost
	url  string // "": there is none
}

func redisURL(t testing.TB) string {
	t.Helper()
	sharedRedis.Do(func() {
		sharedRedis.url = os.Getenv("REDIS_URL")
		if sharedRedis.url == "" {
			sharedRedis.host = newRedisHost(t)
			sharedRedis.url = sharedRedis.host.start(t).url()
		}
	})
	if sharedRedis.url == "" { // the first test to ask was skipped
		skipRedis(t)
	}
	return sharedRedis.url
}

// redisHost is where Redis servers run: this machine, or a container that publishes its ports under the same
// numbers, so that 127.0.0.1 and a port mean the same server on either side.
type redisHost struct {
	enter   []string // what stands in front of a command
	bind    string
	dir     string
	remove  func()
	ports   []string // that nobody has used yet
	servers []*redisServer
}

const portsOfHost = 16

// newRedisHost skips the test where there is neither a redis-server on PATH nor Docker.
func newRedisHost(t testing.TB) *redisHost {
	t.Helper()
	free := freePorts(portsOfHost)
	if _, err := exec.LookPath("redis-server"); err == nil {
		dir, err := os.MkdirTemp("", "session-storage-redis")
		if err != nil {
			t.Fatal(err)
		}
		return &redisHost{bind: "127.0.0.1", dir: dir, ports: free, remove: func() { os.RemoveAll(dir) }}
	}
	if exec.Command("docker", "info").Run() != nil {
		skipRedis(t)
	}
	args := []string{"run", "--detach", "--rm"}
	for _, port := range free {
		args = append(args, "--publish", "127.0.0.1:"+port+":"+port)
	}
	args = append(args, "redis:7-alpine", "sleep", "infinity")
	id, err := exec.Command("docker", args...).Output()
	if err != nil {
		t.Fatalf("docker %s: %v", strings.Join(args, " "), err)
	}
	container := strings.TrimSpace(string(id))
	return &redisHost{
		enter:  []string{"docker", "exec", "--interactive", container},
		bind:   "0.0.0.0",
		dir:    "/data",
		ports:  free,
		remove: func() { exec.Command("docker", "rm", "--force", "--volumes", container).Run() },
	}
}

// ownRedisHost is one that the test need not share.
func ownRedisHost(t testing.TB) *redisHost {
	t.Helper()
	host := newRedisHost(t)
	t.Cleanup(host.stop)
	return host
}

func (h *redisHost) stop() {
	for _, r := range h.servers {
		r.kill()
	}
	h.remove()
}

// command is one that runs on the host.
func (h *redisHost) command(args ...string) *exec.Cmd {
	args = append(slices.Clone(h.enter), args...)
	return exec.Command(args[0], args[1:]...)
}

// write makes a file on the host and returns its path there.
func (h *redisHost) write(t testing.TB, name string, content []byte) string {
	t.Helper()
	path := h.dir + "/" + name
	cmd := h.command("sh", "-c", `cat > "$0"`, path)
	cmd.Stdin = bytes.NewReader(content)
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	return path
}

func (h *redisHost) port() string {
	port := h.ports[0]
	h.ports = h.ports[1:]
	return port
}

// start starts a redis-server with further options.
func (h *redisHost) start(t testing.TB, options ...string) *redisServer {
	t.Helper()
	port := h.port()
	args := []string{"--port", port, "--bind", h.bind, "--protected-mode", "no", "--save", "",
		"--dir", h.dir, "--dbfilename", port + ".rdb", "--appenddirname", port + ".aof"}
	return h.launch(t, port, append(args, options...))
}

// startSentinel starts a sentinel with further lines of configuration.
func (h *redisHost) startSentinel(t testing.TB, lines ...string) *redisServer {
	t.Helper()
	port := h.port()
	lines = append([]string{"port " + port, "bind " + h.bind, "protected-mode no", "dir " + h.dir}, lines...)
	conf := h.write(t, port+".conf", []byte(strings.Join(lines, "\n")+"\n"))
	return h.launch(t, port, []string{conf, "--sentinel"})
}

func (h *redisHost) launch(t testing.TB, port string, args []string) *redisServer {
	t.Helper()
	r := &redisServer{host: h, port: port, args: args}
	h.servers = append(h.servers, r)
	r.launch(t)
	return r
}

// redisServer is a Redis of a test's own, which it may break.
type redisServer struct {
	host *redisHost
	port string
	args []string
	cmd  *exec.Cmd
}

// ownRedis starts a Redis with the given options, and stops it at the test's end.
func ownRedis(t testing.TB, options ...string) *redisServer {
	t.Helper()
	return ownRedisHost(t).start(t, options...)
}

func (r *redisServer) addr() string    { return "127.0.0.1:" + r.port }
func (r *redisServer) url() string     { return "redis://" + r.addr() }
func (r *redisServer) pidFile() string { return r.host.dir + "/" + r.port + ".pid" }

// launch starts the server, anew after kill, and waits until it answers, if only that it is loading.
func (r *redisServer) launch(t testing.TB) {
	t.Helper()
	const script = `echo $$ > "$0" && exec redis-server "$@"`
	r.cmd = r.host.command(append([]string{"sh", "-c", script, r.pidFile()}, r.args...)...)
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "redis-server answers", func() bool {
		c, err := redis.Dial("tcp", r.addr(),
			redis.DialConnectTimeout(time.Second), redis.DialReadTimeout(time.Second))
		if err != nil {
			return false
		}
		defer c.Close()
		_, err = c.Do("PING")
		_, answered := err.(redis.Error)
		return err == nil || answered
	})
}

func (r *redisServer) kill() {
	if r.cmd.ProcessState != nil {
		return // it is dead, and its number may be another process's
	}
	r.signal("KILL")
	r.cmd.Wait()
}

// signal sends a signal by its name, such as STOP or CONT.
func (r *redisServer) signal(name string) {
	r.host.command("sh", "-c", `kill -"$0" "$(cat "$1")"`, name, r.pidFile()).Run()
}

// do runs a command on the server, past the service.
func (r *redisServer) do(t testing.TB, name string, args ...any) any {
	t.Helper()
	return redisDo(t, r.url(), name, args...)
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

// ports are those that this run of the tests may use: another that goes on beside it has others. They lie
// below those that the system hands out by itself.
var ports struct {
	claim net.Listener // of the first one, held until the end
	first uint32
	last  atomic.Uint32 // that was returned
}

const portsOfRun = 2000

func claimPorts() {
	for ports.claim == nil {
		ports.first = 10_000 + portsOfRun*rand.Uint32N(10)
		ports.claim, _ = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", ports.first))
	}
}

// freePorts returns ports that no other test gets: one that was freed could be another's before it is used.
func freePorts(n int) []string {
	var free []string
	for len(free) < n {
		port := fmt.Sprint(ports.first + ports.last.Add(1)%portsOfRun)
		if l, err := net.Listen("tcp", "127.0.0.1:"+port); err == nil {
			l.Close()
			free = append(free, port)
		}
	}
	return free
}

func freePort() string { return freePorts(1)[0] }

// ---------------------------------------------------------------------------------------------------
// Harness: the service, in this process or in one of its own.

// service is a running instance of the program.
type service struct {
	testing.TB
	url     string
	dbPath  string
	log     *logBuffer
	client  *http.Client
	stop    func()    // as SIGTERM does; waits for the end
	process *exec.Cmd // nil when it runs within the test

	mu      sync.Mutex
	secrets []string // that were sent, and must not be logged
	faulty  bool     // its log may hold errors
}

// start runs the service within the test, over TCP, and at the test's end stops it and looks through its log.
// BCRYPT_COST is 4 unless the variables say otherwise. No configuration allows that, but the race detector
// makes bcrypt ten times slower.
func start(t testing.TB, vars ...string) *service {
	t.Helper()
	env := environ(t, vars)
	cost, err := strconv.Atoi(cmp.Or(env["BCRYPT_COST"], "4"))
	if err != nil {
		t.Fatal(err)
	}
	delete(env, "BCRYPT_COST")
	cfg, err := loadConfig(env.get)
	if err != nil {
		t.Fatal(err)
	}
	cfg.server.bcryptCost = cost
	s := newService(t, cfg.dbPath)
	log := slog.New(slog.NewJSONHandler(s.log, &slog.HandlerOptions{Level: cfg.logLevel}))
	ctx, cancel := context.WithCancel(context.Background())
	s.goOn(func() error { return serve(ctx, cfg, log) }, cancel)
	s.url = "http://" + s.log.find(t, "listening")["addr"].(string)
	return s
}

// startProcess runs the program as a process of its own, so that it can be killed. BCRYPT_COST is 10 unless
// the variables say otherwise.
func startProcess(t testing.TB, vars ...string) *service {
	t.Helper()
	s := newProcess(t, vars...)
	s.launch()
	s.url = "http://" + s.log.find(t, "listening")["addr"].(string)
	return s
}

// newProcess is what startProcess launches.
func newProcess(t testing.TB, vars ...string) *service {
	t.Helper()
	env := environ(t, append([]string{"BCRYPT_COST=10"}, vars...))
	maps.DeleteFunc(env, func(_, value string) bool { return value == untuned })
	s := newService(t, env["DB_PATH"])
	s.process = exec.Command("sh", "-c", `eval "$`+beforeEnv+`" && exec "$0"`, os.Args[0])
	s.process.Env = append(os.Environ(), programEnv+"=1")
	for name, value := range env {
		s.process.Env = append(s.process.Env, name+"="+value)
	}
	s.process.Stderr = s.log
	return s
}

// untuned is set where run would otherwise tune the test's own process.
const untuned = "as it is"

// variables is an environment.
type variables map[string]string

func (v variables) get(name string) string { return v[name] }

// environ is the environment of a test's service: a free port, a file of its own, and the given variables.
func environ(t testing.TB, vars []string) variables {
	env := variables{
		"ADDR":       "127.0.0.1:0",
		"DB_PATH":    filepath.Join(t.TempDir(), "users.db"),
		"REDIS_URL":  "", // or a process would have this one's
		"GOGC":       untuned,
		"GOMAXPROCS": untuned,
		beforeEnv:    "true",
	}
	for _, v := range vars {
		name, value, _ := strings.Cut(v, "=")
		env[name] = value
	}
	return env
}

func (s *service) launch() {
	s.Helper()
	if err := s.process.Start(); err != nil {
		s.Fatal(err)
	}
	s.goOn(s.process.Wait, func() { s.process.Process.Signal(syscall.SIGTERM) }) // as docker stop does
}

func newService(t testing.TB, dbPath string) *service {
	client := &http.Client{
		Transport:     &http.Transport{MaxIdleConnsPerHost: 1000},
		Timeout:       30 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return &service{TB: t, dbPath: dbPath, log: &logBuffer{}, client: client}
}

// goOn lets the service run until s.stop, or the test's end, tells it to end.
func (s *service) goOn(run func() error, end func()) {
	ended := make(chan error, 1)
	go func() {
		ended <- run()
		s.log.end()
	}()
	s.stop = sync.OnceFunc(func() {
		s.client.CloseIdleConnections() // one without a request yet would hold up the end
		end()
		if err := <-ended; err != nil && !s.isFaulty() {
			s.Errorf("the end: %v\n%s", err, s.log)
		}
		s.checkLog()
	})
	s.Cleanup(s.stop)
}

// expectErrors lets the service log errors and end in any way.
func (s *service) expectErrors() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faulty = true
}

func (s *service) isFaulty() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.faulty
}

// secret names what must not be logged.
func (s *service) secret(secrets ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.secrets = append(s.secrets, secrets...)
}

// checkLog looks for secrets, for lines that are no JSON, and for errors nobody expected.
func (s *service) checkLog() {
	s.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	log := s.log.String()
	for _, secret := range append(s.secrets, "$2a$", "$2b$", "panic", cookieName+"=") {
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

// logBuffer is a service's standard error.
type logBuffer struct {
	mu    sync.Mutex
	text  bytes.Buffer
	ended bool
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

// end tells that nothing more will be written.
func (b *logBuffer) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ended = true
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// lines returns the lines with that message so far.
func (b *logBuffer) lines(msg string) []map[string]any {
	var found []map[string]any
	for line := range strings.Lines(b.String()) {
		var fields map[string]any
		if json.Unmarshal([]byte(line), &fields) == nil && fields["msg"] == msg {
			found = append(found, fields)
		}
	}
	return found
}

// find waits for a line with that message, and returns the first one.
func (b *logBuffer) find(t testing.TB, msg string) map[string]any {
	t.Helper()
	var found []map[string]any
	deadline := time.Now().Add(15 * time.Second)
	for {
		b.mu.Lock()
		ended := b.ended
		b.mu.Unlock()
		if found = b.lines(msg); len(found) > 0 {
			return found[0]
		}
		if ended || time.Now().After(deadline) {
			t.Fatalf("the service did not log %q:\n%s", msg, b)
		}
		time.Sleep(time.Millisecond)
	}
}

// eventsOf returns how many events log lines stand for.
func eventsOf(lines []map[string]any) (n float64) {
	for _, line := range lines {
		n += line["count"].(float64)
	}
	return n
}

// runWith runs the program with the given variables until ctx ends, or until its first line should it serve.
func runWith(
	ctx context.Context, t *testing.T, args []string, vars ...string,
) (status int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var out, log logBuffer
	stopping := writerFunc(func(line []byte) (int, error) { cancel(); return log.Write(line) })
	status = run(ctx, args, environ(t, vars).get, &out, stopping)
	return status, out.String(), log.String()
}

// writerFunc is an io.Writer in a function.
type writerFunc func([]byte) (int, error)

func (w writerFunc) Write(p []byte) (int, error) { return w(p) }

// each runs a test on the service with either session backend.
func each(t *testing.T, test func(t *testing.T, backend string)) {
	t.Parallel()
	t.Run("sqlite", func(t *testing.T) { t.Parallel(); test(t, "REDIS_URL=") })
	t.Run("redis", func(t *testing.T) { t.Parallel(); test(t, "REDIS_URL="+redisURL(t)) })
}

// ---------------------------------------------------------------------------------------------------
// Harness: asking it.

// reply is what the service answered.
type reply struct {
	status int
	header http.Header
	body   string
	cookie *http.Cookie // session-id, nil when it was not set
	last   bool         // on its connection
}

// send sends a request, such as POST /user, checks what every answer has in common, and returns the answer or
// what broke it.
func (s *service) send(route, body string, header ...string) (*reply, error) {
	s.Helper()
	method, path, _ := strings.Cut(route, " ")
	req, err := http.NewRequest(method, s.url+path, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	if body != "" {
		setHeader(req, "Content-Type: application/json")
	}
	setHeader(req, header...)
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, err
	}
	return readReply(s, route, resp)
}

// setHeader adds header fields to a request, but for a Content-Type, which it replaces.
func setHeader(r *http.Request, header ...string) {
	for _, h := range header {
		name, value, _ := strings.Cut(h, ": ")
		if name == "Content-Type" {
			r.Header.Del(name)
		}
		r.Header.Add(name, value)
	}
}

// readReply reads an answer and checks what every answer has in common.
func readReply(t testing.TB, what string, resp *http.Response) (*reply, error) {
	t.Helper()
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	a := &reply{status: resp.StatusCode, header: resp.Header, body: string(text), last: resp.Close}
	for _, c := range resp.Cookies() {
		if c.Name == cookieName {
			a.cookie = c
		}
	}
	checkReply(t, what, a)
	return a, nil
}

// ask is send for an answer that must come. Like all that may call Fatal it is for the test's own goroutine.
func (s *service) ask(route, body string, header ...string) *reply {
	s.Helper()
	a, err := s.send(route, body, header...)
	if err != nil {
		s.Fatalf("%s: %v", route, err)
	}
	return a
}

// status is send for any goroutine: 0 when no answer came, which is an error of the test.
func (s *service) status(route, body string, header ...string) int {
	s.Helper()
	a, err := s.send(route, body, header...)
	if err != nil {
		s.Errorf("%s: %v", route, err)
		return 0
	}
	return a.status
}

// wantStatus is send for an answer of that status, on any goroutine.
func (s *service) wantStatus(status int, route, body string, header ...string) *reply {
	s.Helper()
	a, err := s.send(route, body, header...)
	if err != nil {
		s.Errorf("%s: %v", route, err)
		return &reply{}
	}
	if a.status != status {
		what := strings.TrimSpace(route + " " + body)
		s.Errorf("%.120s: status %d, want %d: %s", what, a.status, status, a.body)
	}
	return a
}

// checkReply checks what holds of every answer.
func checkReply(t testing.TB, what string, a *reply) {
	t.Helper()
	fail := func(format string, args ...any) {
		t.Helper()
		t.Errorf("%s: status %d: %s\n%v\n%s", what, a.status, fmt.Sprintf(format, args...), a.header, a.body)
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
	for _, internal := range []string{
		"$2a$", "$2b$", "hash", "sqlite", "SQL", "redis", "dial", "goroutine", ".go:", "context", "EOF",
		"127.0.0.1",
	} {
		if strings.Contains(a.body, internal) {
			fail("tells %q", internal)
		}
	}
	if (a.status == 503 || a.status == 429) && a.header.Get("Retry-After") == "" {
		fail("without Retry-After")
	}
	if a.status < 400 {
		return
	}
	if a.cookie != nil {
		fail("sets a cookie")
	}
	if a.body == "" { // of HEAD
		return
	}
	var p struct {
		Title, Detail string
		Status        int
		Errors        map[string]string
	}
	d := json.NewDecoder(strings.NewReader(a.body))
	d.DisallowUnknownFields()
	err := d.Decode(&p)
	if err != nil || p.Title != http.StatusText(a.status) || p.Status != a.status || p.Detail == "" {
		fail("is no problem of RFC 9457 (%v)", err)
	}
}

// dialRaw connects to the service without an HTTP client.
func (s *service) dialRaw() net.Conn {
	s.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { conn.Close() })
	conn.SetReadDeadline(time.Now().Add(30 * time.Second))
	return conn
}

// httpText is a request as it is sent.
func httpText(route, body string, header ...string) string {
	header = append(header, "Host: x", "Content-Type: application/json",
		"Content-Length: "+strconv.Itoa(len(body)))
	return route + " HTTP/1.1\r\n" + strings.Join(header, "\r\n") + "\r\n\r\n" + body
}

// readHTTP reads an answer, on any goroutine: status 0 when none came, which is an error of the test.
func readHTTP(t testing.TB, what string, r *bufio.Reader) *reply {
	t.Helper()
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Errorf("%s: %v", what, err)
		return &reply{}
	}
	a, err := readReply(t, what, resp)
	if err != nil {
		t.Errorf("%s: %v", what, err)
		return &reply{}
	}
	return a
}

const password = "correct horse battery"

var lastEmail atomic.Int64

func newEmail() string { return fmt.Sprintf("user%d@example.com", lastEmail.Add(1)) }

func credentials(email, password string) string {
	text, _ := json.Marshal(map[string]string{"name": "Ada Lovelace", "email": email, "password": password})
	return string(text)
}

// cookie is the header for a session id.
func cookie(id string) string { return "Cookie: " + cookieName + "=" + id }

// from is the header by which a trusted proxy names a client.
func from(addr string) string { return "X-Forwarded-For: " + addr }

const trustLocal = "TRUSTED_PROXIES=127.0.0.0/8"

// userJSON is a user as README writes one.
func userJSON(u User) string {
	return fmt.Sprintf(`{"id":%q,"name":%q,"email":%q,"createdAt":%q,"updateAt":%q}`,
		u.ID, u.Name, u.Email, u.CreatedAt, u.UpdatedAt)
}

// register makes an account over HTTP and returns its user and session id.
func (s *service) register(email string, header ...string) (User, string) {
	s.Helper()
	a := s.ask("POST /user", credentials(email, password), header...)
	if a.status != http.StatusCreated {
		s.Fatalf("POST /user: status %d, want 201: %s", a.status, a.body)
	}
	var created registration
	err := json.Unmarshal([]byte(a.body), &created)
	if err != nil || a.cookie == nil || a.cookie.Value != created.SessionID {
		s.Fatalf("POST /user: %v, cookie %v, body %s", err, a.cookie, a.body)
	}
	s.secret(created.SessionID, password)
	return created.User, created.SessionID
}

// signIn signs in over HTTP and returns the session id.
func (s *service) signIn(email string, header ...string) string {
	s.Helper()
	a := s.ask(signInRoute, credentials(email, password), header...)
	if a.status != http.StatusOK || a.cookie == nil {
		s.Fatalf("POST /user/signin: status %d, want 200 and a cookie: %s", a.status, a.body)
	}
	s.secret(a.cookie.Value)
	return a.cookie.Value
}

// wantCause waits for a log line with that message whose err names the cause.
func (s *service) wantCause(msg, cause string) {
	s.Helper()
	eventually(s, 15*time.Second, fmt.Sprintf("a line %q names the cause %q", msg, cause), func() bool {
		return slices.ContainsFunc(s.log.lines(msg), func(line map[string]any) bool {
			err, _ := line["err"].(string)
			return strings.Contains(err, cause)
		})
	})
}

// want asks for the session's user and checks the status.
func (s *service) want(status int, id string) *reply {
	s.Helper()
	return s.wantStatus(status, "GET /user", "", cookie(id))
}

// wantTurns registers, and signs in n times, each of which ends the session before it.
func (s *service) wantTurns(n int) (id string) {
	s.Helper()
	user, id := s.register(newEmail())
	for range n {
		next := s.signIn(user.Email, cookie(id))
		s.want(401, id)
		s.want(200, next)
		id = next
	}
	return id
}

// wantSignOut ends a session.
func (s *service) wantSignOut(id string) {
	s.Helper()
	s.wantStatus(204, "DELETE /user/session", "", cookie(id))
	s.want(401, id)
}

// wantBack waits for a status, which has to come within 2 s.
func (s *service) wantBack(status int, route string, header ...string) {
	s.Helper()
	elapsed := startWatch()
	eventually(s, 20*time.Second, "the service is back", func() bool {
		return s.status(route, "", header...) == status
	})
	if back := elapsed(); back > 2*time.Second {
		s.Errorf("back after %v, want 2 s at most", back)
	}
}

// ---------------------------------------------------------------------------------------------------
// Harness: accounts, past the service.

const testTime = "2025-03-30T20:00:00.000Z"

// originalDDL is what prisma migrate wrote, to the letter.
const originalDDL = `CREATE TABLE "users" (
    "id" TEXT NOT NULL PRIMARY KEY,
    "name" TEXT NOT NULL,
    "email" TEXT NOT NULL,
    "password" TEXT NOT NULL,
    "createdAt" DATETIME NOT NULL DEFAULT CURRENT_TIMESTAMP,
    "updateAt" DATETIME NOT NULL
);
CREATE UNIQUE INDEX "users_email_key" ON "users"("email");
`

// millis is how Prisma's engine writes a time, and millisTime how that is answered.
const (
	millis     = int64(1743364800123)
	millisTime = "2025-03-30T20:00:00.123Z"
)

// originalFile makes a file as another program would, with accounts whose ids are their emails. What it
// returns is no service, but has its exec and query.
func originalFile(t testing.TB, ddl string, emails ...string) *service {
	t.Helper()
	file := &service{TB: t, dbPath: filepath.Join(t.TempDir(), "dev.db")}
	file.exec(ddl)
	for _, email := range emails {
		file.exec(`INSERT INTO users VALUES (?1, 'Ada', ?1, ?2, ?3, ?3)`,
			email, hashOf(t, password, bcrypt.MinCost), millis)
	}
	return file
}

// hashOf is a bcrypt hash of a password.
func hashOf(t testing.TB, password string, cost int) string {
	t.Helper()
	hash, err := bcrypt.GenerateFromPassword([]byte(password), cost)
	if err != nil {
		t.Fatal(err)
	}
	return string(hash)
}

// addAccount puts an account with a password hash of the given cost into the database, past the service.
func (s *service) addAccount(email string, cost int) User {
	s.Helper()
	user := User{ID: newUUID(), Name: "Ada Lovelace", Email: email, CreatedAt: testTime, UpdatedAt: testTime}
	s.exec(`INSERT INTO users (id, name, email, createdAt, updateAt, password)
		VALUES (?, ?, ?, 1743364800000, 1743364800000, ?)`,
		user.ID, user.Name, user.Email, hashOf(s, password, cost))
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

// query returns one value from the service's database.
func query[T any](s *service, query string, args ...any) (value T) {
	s.Helper()
	db := openSQL(s, s.dbPath)
	defer db.Close()
	if err := db.QueryRow(query, args...).Scan(&value); err != nil {
		s.Fatal(err)
	}
	return value
}

// openSQL opens a database as another program would, which knows nothing of WAL.
func openSQL(t testing.TB, path string) *sql.DB {
	t.Helper()
	db, err := sql.Open("sqlite", "file:"+path+"?_pragma=busy_timeout(5000)")
	if err != nil {
		t.Fatal(err)
	}
	return db
}

// lockFile begins a write to a file that does not end before unlock.
func lockFile(t testing.TB, path string) (unlock func()) {
	t.Helper()
	db := openSQL(t, path)
	t.Cleanup(func() { db.Close() })
	tx, err := db.Begin()
	if err == nil {
		_, err = tx.Exec(`UPDATE users SET name = name`)
	}
	if err != nil {
		t.Fatal(err)
	}
	return func() { tx.Rollback() }
}

// holds checks that the file is whole and that the original, which compares bytes, finds each account.
func (s *service) holds(accounts *sync.Map) {
	s.Helper()
	if verdict := query[string](s, `PRAGMA integrity_check`); verdict != "ok" {
		s.Errorf("integrity_check: %s", verdict)
	}
	for email := range accounts.Range {
		if query[int](s, `SELECT count(*) FROM users WHERE email = ?`, email) != 1 {
			s.Errorf("the account of %s is lost", email)
		}
	}
}

func openTestDatabase(t testing.TB) *database {
	t.Helper()
	db, err := openDatabase(t.Context(), filepath.Join(t.TempDir(), "users.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// ---------------------------------------------------------------------------------------------------
// Harness: a unit of the service, without a network and in virtual time.

// inVirtualTime runs a subtest in a bubble of testing/synctest, where nobody waits for time to pass.
func inVirtualTime(t *testing.T, name string, test func(t *testing.T)) {
	t.Helper()
	t.Run(name, func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, test)
	})
}

// unit is a server without a network, which can run in virtual time, and what a test wants to have of it.
type unit struct {
	*service
	server   *server
	sessions *mapSessions              // unless the test has brought others
	trouble  func(method string) error // of mapSessions, which fail with its answer
	bcrypt   *bcryptWatch
}

// unitConfig is how a unit differs from one with mapSessions, and one slot for bcrypt at its lowest cost.
type unitConfig struct {
	sessions    SessionStore
	bcryptSlots int
	bcryptCost  int
}

func newUnit(t testing.TB, cfg unitConfig) *unit {
	t.Helper()
	s := &unit{
		service: &service{TB: t, dbPath: filepath.Join(t.TempDir(), "users.db"), log: &logBuffer{}},
		trouble: failing("", nil),
		bcrypt:  &bcryptWatch{before: func(string) {}},
	}
	s.sessions = newMapSessions(func(method string) error { return s.trouble(method) })
	db, err := openDatabase(t.Context(), s.dbPath)
	if err != nil {
		t.Fatal(err)
	}
	config := serverConfig{
		sessionTTL:     time.Hour,
		bcryptCost:     max(cfg.bcryptCost, bcrypt.MinCost),
		bcryptSlots:    max(cfg.bcryptSlots, 1),
		trustedProxies: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")},
		compareHash:    s.bcrypt.compare,
	}
	sessions := cfg.sessions
	if sessions == nil {
		sessions = s.sessions
	}
	s.server = newServer(config, db, sessions, slog.New(slog.NewJSONHandler(s.log, nil)))
	t.Cleanup(func() {
		s.server.drain(context.Background())
		db.Close()
		s.checkLog()
	})
	return s
}

// request sends an email and a password.
func (s *unit) request(
	ctx context.Context, client, route, email, password string, header ...string,
) *reply {
	s.Helper()
	return s.serve(ctx, client, route, credentials(email, password), header...)
}

// serve answers a request. The client is an address that a trusted proxy names, or "peer" and one that none
// does.
func (s *unit) serve(ctx context.Context, client, route, body string, header ...string) *reply {
	s.Helper()
	method, path, _ := strings.Cut(route, " ")
	r := httptest.NewRequestWithContext(ctx, method, path, strings.NewReader(body))
	if peer, isPeer := strings.CutPrefix(client, "peer "); isPeer {
		r.RemoteAddr = net.JoinHostPort(peer, "5")
	} else {
		r.RemoteAddr = "127.0.0.9:5"
		setHeader(r, from(client))
	}
	setHeader(r, "Content-Type: application/json")
	setHeader(r, header...)
	w := httptest.NewRecorder()
	s.server.ServeHTTP(w, r)
	a, err := readReply(s, route, w.Result())
	if err != nil {
		s.Error(err)
		return &reply{}
	}
	return a
}

// wantSignIn signs in as client oneAddr.
func (s *unit) wantSignIn(status int, email, password string) {
	s.Helper()
	if a := s.request(s.Context(), oneAddr, signInRoute, email, password); a.status != status {
		s.Errorf("%s %s, %s: status %d, want %d", signInRoute, email, password, a.status, status)
	}
}

// failures are sign-ins of client oneAddr, with a wrong password. In email # is the number of the failure.
func (s *unit) failures(n int, email string) {
	s.Helper()
	for i := range n {
		s.wantSignIn(401, numbered(email, i), wrongPassword)
	}
}

// numbered returns text with n for each #.
func numbered(text string, n int) string { return strings.ReplaceAll(text, "#", strconv.Itoa(n)) }

// breakFile makes the account database unreadable.
func (s *unit) breakFile() {
	s.exec(`PRAGMA wal_checkpoint(TRUNCATE)`)
	os.WriteFile(s.dbPath, slices.Repeat([]byte("no database "), 1000), 0o600)
}

// listen serves the unit's HTTP within a bubble, until the test's end. dial returns a client's end of a
// connection.
func (s *unit) listen() (dial func() net.Conn) {
	s.Helper()
	conns := make(chan net.Conn)
	pipes := &pipeListener{conns, sync.OnceFunc(func() { close(conns) })}
	served := make(chan error, 1)
	accepted := &listener{Listener: pipes, server: s.server}
	go func() { served <- serveHTTP(s.Context(), accepted, s.server, 0, s.server.log) }()
	s.Cleanup(func() {
		if err := <-served; err != nil {
			s.Error(err)
		}
	})
	return func() net.Conn {
		client, server := net.Pipe()
		s.Cleanup(func() { client.Close() })
		conns <- server
		return client
	}
}

// pipeListener accepts connections within the process, which know the virtual time of a synctest bubble.
type pipeListener struct {
	conns chan net.Conn
	close func()
}

func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{} }
func (l *pipeListener) Close() error   { l.close(); return nil }

func (l *pipeListener) Accept() (net.Conn, error) {
	conn, ok := <-l.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return conn, nil
}

// bcryptWatch is bcrypt's comparison, and tells what it really did.
type bcryptWatch struct {
	comparisons atomic.Int64
	rounds      atomic.Int64
	before      func(password string) // may take its time
}

func (b *bcryptWatch) compare(hash, password []byte) error {
	b.before(string(password))
	err := bcrypt.CompareHashAndPassword(hash, password)
	if err == nil || errors.Is(err, bcrypt.ErrMismatchedHashAndPassword) {
		cost, _ := bcrypt.Cost(hash)
		b.comparisons.Add(1)
		b.rounds.Add(1 << cost)
	}
	return err
}

// mapSessions is a session backend in a few lines, which shows that one can be plugged in.
type mapSessions struct {
	fail     func(method string) error // asked first by each method, which fails with its answer
	mu       sync.Mutex
	sessions map[string]mapSession
}

type mapSession struct {
	user User
	ends time.Time
}

func newMapSessions(fail func(method string) error) *mapSessions {
	return &mapSessions{fail: fail, sessions: map[string]mapSession{}}
}

// failing breaks one method of mapSessions, or none, which is "".
func failing(method string, err error) func(string) error {
	return func(called string) error {
		if called == method {
			return err
		}
		return nil
	}
}

func (m *mapSessions) Create(_ context.Context, id string, user User, ttl time.Duration) error {
	if err := m.fail("Create"); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sessions[id] = mapSession{user, time.Now().Add(ttl)}
	return nil
}

func (m *mapSessions) Get(_ context.Context, id string) (User, error) {
	if err := m.fail("Get"); err != nil {
		return User{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if s, ok := m.sessions[id]; ok && time.Now().Before(s.ends) {
		return s.user, nil
	}
	return User{}, errNoSession
}

// Delete heeds a client that has left.
func (m *mapSessions) Delete(ctx context.Context, id string) error {
	if err := cmp.Or(m.fail("Delete"), ctx.Err()); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	s, ok := m.sessions[id]
	delete(m.sessions, id)
	if !ok || !time.Now().Before(s.ends) {
		return errNoSession
	}
	return nil
}

func (m *mapSessions) Ping(context.Context) error { return m.fail("Ping") }
func (m *mapSessions) Close() error               { return nil }

// ids returns the ids of the sessions that there are.
func (m *mapSessions) ids() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Sorted(maps.Keys(m.sessions))
}

const (
	adaEmail      = "ada@example.com"
	adaID         = "cmwvz6g860000s77djf949o54"
	oneAddr       = "198.51.100.7"
	signInRoute   = "POST /user/signin"
	registerRoute = "POST /user"
	wrongPassword = "wrong password"
)

// ---------------------------------------------------------------------------------------------------
// Harness: sessions in a fake Redis, which says what a test wants, and in a real one behind a bad network.

func testUser(i int) User {
	return User{
		ID:        newUUID(),
		Name:      fmt.Sprintf("User %d", i),
		Email:     fmt.Sprintf("user%d@example.com", i),
		CreatedAt: testTime,
		UpdatedAt: "2025-03-31T20:00:00.123Z",
	}
}

func openRedisSessions(t testing.TB, url string) *redisSessions {
	t.Helper()
	target, err := parseRedisURL(url)
	if err != nil {
		t.Fatalf("%s: %v", url, err)
	}
	s := newRedisSessions(target, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { s.Close() })
	return s
}

// storeCalls are the four things that are asked of a store.
var storeCalls = map[string]func(store SessionStore, id string) error{
	"Create": func(store SessionStore, id string) error {
		return store.Create(context.Background(), id, testUser(1), time.Hour)
	},
	"Get": func(store SessionStore, id string) error {
		_, err := store.Get(context.Background(), id)
		return err
	},
	"Delete": func(store SessionStore, id string) error { return store.Delete(context.Background(), id) },
	"Ping":   func(store SessionStore, _ string) error { return store.Ping(context.Background()) },
}

// checkedStore fails the test where a call has another result than it must. It repeats a call that was not
// answered in time: a busy machine may keep a Redis from running.
type checkedStore struct {
	testing.TB
	SessionStore
}

func (s checkedStore) createAs(id string, user User, ttl time.Duration) {
	s.Helper()
	err := s.Create(s.Context(), id, user, ttl)
	for errors.Is(err, errUnavailable) { // a slow disk may not take all of them in time
		err = s.Create(s.Context(), id, user, ttl)
	}
	if err != nil {
		s.Errorf("Create: %v", err)
	}
}

func (s checkedStore) get(id string) (User, error) {
	user, err := s.Get(s.Context(), id)
	for errors.Is(err, errTimeout) {
		user, err = s.Get(s.Context(), id)
	}
	return user, err
}

func (s checkedStore) create(user User, ttl time.Duration) string {
	s.Helper()
	id := newUUID()
	s.createAs(id, user, ttl)
	return id
}

func (s checkedStore) remove(id string) {
	s.Helper()
	err := s.Delete(s.Context(), id)
	if errors.Is(err, errTimeout) { // that one may yet have deleted it
		err = s.Delete(s.Context(), id)
		if errors.Is(err, errNoSession) {
			err = nil
		}
	}
	if err != nil {
		s.Errorf("Delete: %v", err)
	}
}

func (s checkedStore) some(id string, user User) {
	s.Helper()
	if got, err := s.get(id); got != user || err != nil {
		s.Errorf("Get: %v, %v, want %v", got, err, user)
	}
}

func (s checkedStore) none(id string) {
	s.Helper()
	user, err := s.get(id)
	if !errors.Is(err, errNoSession) || errors.Is(err, errUnavailable) || user != (User{}) {
		s.Errorf("Get: %v, %v, want errNoSession", user, err)
	}
	if err := s.Delete(s.Context(), id); !errors.Is(err, errNoSession) || errors.Is(err, errUnavailable) {
		s.Errorf("Delete: %v, want errNoSession", err)
	}
}

// readRESP reads one value of RESP 2, a command or a reply. It returns the value as it was sent, and the
// strings in it.
func readRESP(r *bufio.Reader) (raw []byte, texts []string, err error) {
	raw, err = r.ReadBytes('\n')
	if err != nil {
		return nil, nil, err
	}
	n, _ := strconv.Atoi(string(bytes.TrimSpace(raw[1:])))
	switch {
	case raw[0] == '$' && n >= 0:
		text := make([]byte, n+len("\r\n"))
		if _, err := io.ReadFull(r, text); err != nil {
			return nil, nil, err
		}
		return append(raw, text...), []string{string(text[:n])}, nil
	case raw[0] == '*':
		for range n {
			element, inIt, err := readRESP(r)
			if err != nil {
				return nil, nil, err
			}
			raw = append(raw, element...)
			texts = append(texts, inIt...)
		}
	}
	return raw, texts, nil
}

// fakeRedis is a Redis in virtual time. It answers each command with what a function returns: "" for nothing,
// cutOff to close the connection, readNoMore to keep it and read no more. ASKING and ECHO, by which a dial
// proves itself, are answered apart from that.
type fakeRedis struct {
	answer func(command []string) string
	delays map[string]time.Duration // of the answers to a command

	mu       sync.Mutex
	mute     bool // dials are not answered
	plain    bool // it is no node of a cluster
	received [][]string
	dialed   int // connections so far
	open     int // connections that are still open
}

const (
	cutOff     = "cut off"
	readNoMore = "read no more"
)

func (f *fakeRedis) locked(do func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	do()
}

// serve answers until the connection, or ctx, ends.
func (f *fakeRedis) serve(ctx context.Context, conn net.Conn) {
	defer f.locked(func() { f.open-- })
	defer conn.Close()
	in := bufio.NewReader(conn)
	for proven := false; ; {
		_, command, err := readRESP(in)
		if err != nil {
			return
		}
		var delay time.Duration
		f.locked(func() { delay = f.delays[command[0]] })
		time.Sleep(delay) // while others are answered: in a bubble, who waits for a mutex stops the clock
		var reply string
		f.locked(func() {
			switch {
			case !proven && command[0] == "ASKING" && f.plain:
				reply = "-ERR This instance has cluster support disabled\r\n"
			case !proven && command[0] == "ASKING":
				reply = plainReply(command)
			case proven || command[0] != "ECHO":
				f.received = append(f.received, command)
				reply = f.answer(command)
			case !f.mute:
				proven = true
				reply = plainReply(command)
			}
		})
		switch reply {
		case cutOff:
			return
		case readNoMore:
			<-ctx.Done()
			return
		}
		io.WriteString(conn, reply)
	}
}

// seen returns how often a command was received, with a first argument if one is given. Of ECHO only those
// count that end a flush.
func (f *fakeRedis) seen(command ...string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, received := range f.received {
		if len(received) >= len(command) && slices.Equal(received[:len(command)], command) {
			n++
		}
	}
	return n
}

// commands returns the names of those that were received, with a space behind each.
func (f *fakeRedis) commands() (names string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, command := range f.received {
		names += command[0] + " "
	}
	return names
}

// connections returns how many were made and how many are left.
func (f *fakeRedis) connections() (dialed, open int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.dialed, f.open
}

func bulkString(text string) string { return fmt.Sprintf("$%d\r\n%s\r\n", len(text), text) }

// plainReply is what a Redis says that has every session, each with its key for the user's id.
func plainReply(command []string) string {
	switch command[0] {
	case "MULTI", "AUTH", "ASKING":
		return "+OK\r\n"
	case "HSET", "EXPIRE":
		return "+QUEUED\r\n"
	case "EXEC":
		return "*2\r\n:5\r\n:1\r\n"
	case "DEL":
		return ":1\r\n"
	case "HGETALL":
		return "*2\r\n$2\r\nid\r\n" + bulkString(command[1])
	case "ECHO":
		return bulkString(command[1])
	case "ROLE":
		return "*1\r\n$6\r\nmaster\r\n"
	}
	return "-ERR unknown command\r\n"
}

type finder = func(ctx context.Context, addr string) (*fakeRedis, error)

// slowly returns a find that takes some time.
func slowly(takes time.Duration, find finder) finder {
	return func(ctx context.Context, addr string) (*fakeRedis, error) {
		select {
		case <-time.After(takes):
			return find(ctx, addr)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// virtualSessions are sessions in virtual time, in the fakes that find returns by address.
func virtualSessions(
	t testing.TB, url string, find finder,
) *redisSessions {
	t.Helper()
	target, err := parseRedisURL(url)
	if err != nil {
		t.Fatal(err)
	}
	var served sync.WaitGroup
	dial := func(ctx context.Context, _, addr string) (net.Conn, error) {
		redis, err := find(ctx, addr)
		if err := cmp.Or(err, ctx.Err()); err != nil {
			return nil, err
		}
		client, server := net.Pipe()
		redis.locked(func() { redis.dialed++; redis.open++ })
		served.Go(func() { redis.serve(t.Context(), server) })
		return client, nil
	}
	s := &redisSessions{newRouter(&redisDialer{target, dial}, slog.New(slog.DiscardHandler))}
	t.Cleanup(func() {
		s.Close()
		served.Wait()
	})
	return s
}

// fakeNodes are fakes by address. A dial to any other address hangs.
type fakeNodes map[string]*fakeRedis

func (nodes fakeNodes) find(ctx context.Context, addr string) (*fakeRedis, error) {
	if f := nodes[addr]; f != nil {
		return f, nil
	}
	<-ctx.Done()
	return nil, ctx.Err()
}

// fakeSessions are sessions in one fake.
func fakeSessions(t testing.TB, answer func(command []string) string) (*redisSessions, *fakeRedis) {
	t.Helper()
	f := &fakeRedis{answer: answer}
	return virtualSessions(t, "redis://h", fakeNodes{"h:6379": f}.find), f
}

// wantOwn looks a session up that plainReply has.
func wantOwn(t testing.TB, store *redisSessions) {
	t.Helper()
	id := newUUID()
	if user, err := store.Get(t.Context(), id); err != nil || user.ID != sessionKey(id) {
		t.Errorf("Get %s: %v, %v", id, user, err)
	}
}

// fault is given a whole reply of Redis and returns what the service receives in its stead, or an error
// to cut the connection after that.
type fault func(reply []byte) ([]byte, error)

// proxy stands between the service and its Redis, and does what a bad network does, or worse.
type proxy struct {
	addr  string
	mu    sync.Mutex
	conns map[net.Conn]bool
	fault fault
	delay time.Duration // of replies; each waits for itself
}

func startProxy(t testing.TB, target string, delay time.Duration) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{addr: l.Addr().String(), conns: map[net.Conn]bool{}, delay: delay}
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
	type delayed struct {
		due  time.Time
		data []byte
	}
	replies := make(chan delayed, 10_000)
	var sent sync.WaitGroup
	sent.Go(func() {
		for r := range replies {
			time.Sleep(time.Until(r.due))
			client.Write(r.data)
		}
	})
	defer sent.Wait()
	defer close(replies)
	in := bufio.NewReader(server)
	for err == nil {
		var reply []byte
		reply, err = p.receive(in)
		if len(reply) > 0 {
			replies <- delayed{time.Now().Add(p.delay), reply}
		}
	}
}

// receive returns a reply of Redis, or what the fault makes of it.
func (p *proxy) receive(in *bufio.Reader) ([]byte, error) {
	reply, _, err := readRESP(in)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	f := p.fault
	p.mu.Unlock()
	if f == nil {
		return reply, nil
	}
	return f(reply)
}

// ---------------------------------------------------------------------------------------------------
// Harness: time and chance.

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

// stalls is for how long, in all, a busy machine has kept the tests from running.
var stalls atomic.Int64 // nanoseconds

func measureStalls() {
	const beat = 10 * time.Millisecond
	for {
		began := time.Now()
		time.Sleep(beat)
		stalls.Add(int64(time.Since(began) - beat))
	}
}

// startWatch returns a function that tells how much time has passed since, without the stalls.
func startWatch() (elapsed func() time.Duration) {
	began := time.Now()
	before := stalls.Load()
	return func() time.Duration { return time.Since(began) - time.Duration(stalls.Load()-before) }
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

// long: SESSION_STORAGE_LONG=1 runs the long forms of tests of chance.
var long = os.Getenv("SESSION_STORAGE_LONG") != ""

// rounds is how often a test of chance is repeated.
func rounds(short, whenLong int) int {
	if long {
		return whenLong
	}
	return short
}

// ---------------------------------------------------------------------------------------------------
// The API: requests and answers.

func TestTheWholeStory(t *testing.T) {
	each(t, func(t *testing.T, backend string) {
		s := start(t, backend)
		uuid := regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
		milliseconds := regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$`)
		const attributes = "; HttpOnly; Secure; SameSite=Lax"
		before := time.Now().UTC().Format(timeFormat)
		a := s.ask("POST /user",
			`{"name":" Ada Lovelace ","email":" Ada@Example.COM ","password":"correct horse"}`)
		var created registration
		json.Unmarshal([]byte(a.body), &created)
		u := created.User
		first := created.SessionID
		s.secret("correct horse", first)
		if a.status != 201 || a.body != fmt.Sprintf(`{"user":%s,"sessionId":%q}`, userJSON(u), first) ||
			a.header.Get("Set-Cookie") != "session-id="+first+"; Path=/; Max-Age=604800"+attributes {
			t.Fatalf("POST /user: status %d, %v: %s", a.status, a.header, a.body)
		}
		if u.Name != "Ada Lovelace" || u.Email != "Ada@Example.COM" || u.CreatedAt != u.UpdatedAt ||
			u.CreatedAt < before || !milliseconds.MatchString(u.CreatedAt) || !uuid.MatchString(first) {
			t.Errorf("POST /user: %+v", created)
		}
		for route, want := range map[string]string{"GET /user": userJSON(u), "HEAD /user": ""} {
			a := s.ask(route, "", cookie(first))
			if a.status != 200 || a.body != want || a.cookie != nil || a.header.Get("X-User-Id") != u.ID {
				t.Errorf("%s: %+v, want %s, X-User-Id and no cookie", route, a, want)
			}
		}
		a = s.ask("POST /user/signin", `{"email":"ADA@example.com ","password":"correct horse"}`)
		if a.status != 200 || a.body != userJSON(u) || a.cookie == nil || a.cookie.Value == first {
			t.Fatalf("POST /user/signin: status %d, cookie %v: %s", a.status, a.cookie, a.body)
		}
		second := a.cookie.Value
		s.secret(second)
		s.want(200, first) // signing in elsewhere does not end other sessions
		for _, id := range []string{second, second, newUUID(), ""} {
			a := s.ask("DELETE /user/session", "", cookie(id))
			got, want := a.header.Get("Set-Cookie"), "session-id=; Path=/; Max-Age=0"+attributes
			if a.status != 204 || a.body != "" || got != want {
				t.Errorf("DELETE /user/session: status %d, body %q, Set-Cookie: %s", a.status, a.body, got)
			}
		}
		s.want(200, first)
		if a := s.want(401, second); a.header.Get("X-User-Id") != "" {
			t.Error("GET /user: 401 with X-User-Id")
		}
		if a := s.ask("GET /healthz", ""); a.status != 200 || a.body != `{"status":"ok"}` {
			t.Errorf("GET /healthz: status %d: %s", a.status, a.body)
		}
		for msg, user := range map[string]any{"registered": u.ID, "signed in": u.ID, "signed out": nil} {
			line := s.log.find(t, msg)
			if n := len(s.log.lines(msg)); n != 1 || line["client"] != "127.0.0.1" || line["user"] != user {
				t.Errorf("log line %v, %d times, want once, for user %v", line, n, user)
			}
		}
	})
}

func TestRoutes(t *testing.T) {
	t.Parallel()
	s := start(t)
	const userMethods = "GET, HEAD, POST"
	for answer, allow := range map[string]string{
		"GET / 404": "", "POST / 404": "", "GET /users 404": "", "GET /user// 404": "", "GET //user 404": "",
		"GET /%75ser 404": "", "GET /user%2F 404": "", "GET /user/../healthz 404": "", "GET /./user 404": "",
		"GET /user/session/x 404": "", "CONNECT /x 404": "", "GET /debug/vars 404": "",
		"HEAD /healthz 200": "", "GET /User 401": "", "GET /user/ 401": "", "GET /USER/?x=1 401": "",
		"HEAD /user 401": "", "POST /USER/SIGNIN/ 415": "", "DELETE /User/Session/ 204": "",
		"GET /Healthz/ 200": "",
		"PUT /user 405":     userMethods, "DELETE /User/ 405": userMethods, "OPTIONS /user 405": userMethods,
		"GET /user/signin 405": "POST", "GET /user/session 405": "DELETE", "HEAD /user/session 405": "DELETE",
		"POST /healthz 405": "GET, HEAD", "BREW /healthz 405": "GET, HEAD",
	} {
		route, status := answer[:len(answer)-4], answer[len(answer)-3:]
		a := s.ask(route, "")
		if strconv.Itoa(a.status) != status || a.header.Get("Allow") != allow {
			t.Errorf("%s: status %d, %v, want %s, Allow %q", route, a.status, a.header, status, allow)
		}
	}
	for target, want := range map[string]int{
		"OPTIONS *": 404, "GET http://x": 404, "GET http://x/nowhere": 404, "GET http://x/Healthz": 200,
		"CONNECT x:1": 404,
	} {
		conn := s.dialRaw()
		io.WriteString(conn, target+" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		if a := readHTTP(t, target, bufio.NewReader(conn)); a.status != want {
			t.Errorf("%s: status %d, want %d", target, a.status, want)
		}
	}
}

// formWith is a registration that would succeed, with one of its fields changed.
func formWith(field, value string) string {
	form := map[string]string{"name": "Ada", "email": newEmail(), "password": password}
	form[field] = value
	text, _ := json.Marshal(form)
	return string(text)
}

func TestBodiesThatAreRefused(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.register("taken@example.com")
	type refusal struct {
		body   string
		route  string // registerRoute where there is none
		header string
		status int
		fields string // of errors
		detail string
	}
	const good = `"name":"Ada","email":"free@example.com","password":"correct horse"`
	const whole = "{" + good + "}"
	const all = "email name password"
	cases := []refusal{
		{body: whole, header: "Content-Type: ", status: 415},
		{body: whole, header: "Content-Type: text/plain", status: 415, detail: "application/json"},
		{body: whole, header: "Content-Encoding: gzip", status: 415, detail: "plain"},
		{body: whole, header: "Content-Encoding: identity\nContent-Encoding: gzip", status: 415},
		{body: whole + strings.Repeat(" ", maxBody-len(whole)+1), status: 413},
		{body: credentials("taken@example.com", "another password"), status: 409},
		{body: credentials(" TAKEN@example.com", "another password"), status: 409},
		{route: signInRoute, body: `{"email":"a@b"}`, status: 400, fields: "password"},
		{route: signInRoute, body: `{"email":"","password":"p"}`, status: 400, fields: "email"},
		{route: signInRoute, body: `{"email":" \t\u00a0","password":"p"}`, status: 400, fields: "email"},
		{route: signInRoute, body: `{"email":1,"password":null}`, status: 400, fields: "email password"},
		{route: signInRoute, body: credentials("no rule for new accounts holds", "x"), status: 401},
		{route: signInRoute, body: credentials(strings.Repeat("x", 300), "x"), status: 401},
	}
	for _, body := range []string{` `, `{name:1}`, `{` + good, `[` + whole + `]`, `null`, `"x"`, whole + `{}`,
		whole + ` x`, "\ufeff\ufeff" + whole, `{` + good + ",\"x\":\"\xff\"}"} {
		cases = append(cases, refusal{body: body, status: 400, detail: "JSON"})
	}
	for _, body := range []string{`{}`, `{"name":null,"email":null,"password":null}`,
		`{"name":"","email":"","password":""}`,
		`{"name":1,"email":["a@b"],"password":{}}`, `{"Name":"Ada","EMAIL":"a@b","Password":"correct horse"}`,
		`{"x":` + strings.Repeat("[", 8000) + strings.Repeat("]", 8000) + `}`} {
		cases = append(cases, refusal{body: body, status: 400, fields: all})
	}
	for field, values := range map[string][]string{
		"name": {" \t ", strings.Repeat("é", 101), "A\nB", "A\u0085B", "A\x00B", "\u200b", "\u3164",
			"\u115f\u200d \ufe0f", "A\u202eB", "A\u2066B", "A\u200fB", "A\u061cB"},
		"email": {"ada", "@example.com", "ada@", "a@b@c", "Ada <a@b>", "a@b,c@d", "a@b\r\nBcc: c@d", "a b@c",
			`"a"@b`, "a@[b]", "a(x)@b", "a:b@c", "a;b@c", `a\b@c`, "a\x00b@c", "a\u00a0b@c", "a\u200bb@c",
			"a\u200db@c", "a\u00adb@c", "a\u3164b@c", "a\u202eb@c", "a\ufe0f@c",
			strings.Repeat("a", 243) + "@example.com"},
		"password": {"1234567", strings.Repeat("p", 73), strings.Repeat("é", 37), "correct\x00horse"},
	} {
		for _, value := range values {
			cases = append(cases, refusal{body: formWith(field, value), status: 400, fields: field})
		}
	}
	for _, tt := range cases {
		route := cmp.Or(tt.route, registerRoute)
		a := s.ask(route, tt.body, strings.Split(cmp.Or(tt.header, "Accept: */*"), "\n")...)
		var p problem
		json.Unmarshal([]byte(a.body), &p)
		fields := strings.Join(slices.Sorted(maps.Keys(p.Errors)), " ")
		if a.status != tt.status || fields != tt.fields || !strings.Contains(p.Detail, tt.detail) ||
			slices.Contains(slices.Collect(maps.Values(p.Errors)), "") {
			t.Errorf("%s %.90q %s: status %d, want %d, %q and errors of %q: %s",
				route, tt.body, tt.header, a.status, tt.status, tt.detail, tt.fields, a.body)
		}
	}
	if n := query[int](s, `SELECT count(*) FROM users`); n != 1 {
		t.Errorf("%d accounts, want the first one only", n)
	}
}

func TestBodiesThatAreAccepted(t *testing.T) {
	t.Parallel()
	s := start(t)
	plain := formWith("name", "Ada")
	headers := map[string]string{ // by body
		plain + strings.Repeat(" ", maxBody-len(plain)): "",
		"\ufeff" + formWith("name", "Ada"):              "",
		formWith("name", "Identity"):                    "Content-Encoding: Identity",
		formWith("name", "Charset"):                     "Content-Type: Application/JSON; charset=utf-8",
		formWith("name", "Malformed"):                   "Content-Type: application/json; charset",
		strings.Replace(formWith("name", "Ada"), "{", `{"role":["admin"],"n":1e999,"Name":7,`, 1): "",
	}
	for field, values := range map[string][]string{
		"name": {strings.Repeat("é", 100), `<b>&"\`, "李", " Ada\u00a0Lovelace ", "👩\u200d💻",
			"نیم\u200cفاصله"},
		"email": {"a..b@docomo.example", "o'brien+tag@sub.example.com", "ÄÖ@exämple.com", " A.B@C\n",
			"İnfo@example.com", strings.Repeat("a", 242) + "@example.com"},
		"password": {strings.Repeat("p", 72), strings.Repeat("é", 36), "        ", "pass\nwör", `"\\\\\\"`},
	} {
		for _, value := range values {
			headers[formWith(field, value)] = ""
		}
	}
	for body, header := range headers {
		a := s.ask("POST /user", body, cmp.Or(header, "Accept: */*"))
		var form struct{ Name, Email any }
		json.Unmarshal([]byte(strings.TrimPrefix(body, "\ufeff")), &form)
		var got registration
		json.Unmarshal([]byte(a.body), &got)
		wantEmail := strings.TrimSpace(form.Email.(string))
		if a.status != 201 || got.User.Name != strings.TrimSpace(form.Name.(string)) ||
			got.User.Email != wantEmail {
			t.Errorf("POST /user %.90s %s: status %d, want 201, trimmed: %s", body, header, a.status, a.body)
		}
		s.wantStatus(200, "POST /user/signin", body)
	}
}

// skipLong spares the fuzzer inputs that would only cost it time.
func skipLong(t *testing.T, texts ...string) {
	if len(strings.Join(texts, "")) > 64<<10 {
		t.Skip()
	}
}

func FuzzRegistration(f *testing.F) {
	for _, text := range []string{ // as they stand in JSON
		`ada@example.com`, ` Łukasz@DOCOMO.example `, `1234567\u0000@x`, `\u200b\u3164\u2800\ufe0f`,
		`a@b\u202e`,
		`1234\u3164@x`, `Ada<a@b>`, `a@b@c`, "\xff234567@x", strings.Repeat("x", 255) + "@b", `"}, null`,
	} {
		f.Add(`{"name":"Ada","email":"a@b","password":"` + text + `"}`)
		f.Add(`{"name":"Ada","email":"` + text + `","password":"12345678"}`)
		f.Add("\ufeff" + `{"name":"` + text + `","email":"a@b","password":"12345678"}`)
	}
	const invisible = `\s\pZ\p{Cc}\p{Cf}\x{34f}\x{115f}\x{1160}\x{2800}\x{3164}\x{fe00}-\x{fe0f}\x{ffa0}`
	const inEmail = `[^@` + invisible + `"()\[\]<>,:;\\]+`
	visible := regexp.MustCompile(`[^` + invisible + `]`)
	forbidden := regexp.MustCompile(`[\p{Cc}\x{61c}\x{200e}\x{200f}\x{202a}-\x{202e}\x{2066}-\x{2069}]`)
	address := regexp.MustCompile(`^` + inEmail + `@` + inEmail + `$`)
	s := newUnit(f, unitConfig{})
	number := 0
	f.Fuzz(func(t *testing.T, body string) {
		skipLong(t, body)
		s.TB = t
		defer func() { s.TB = f }()
		number++
		client := fmt.Sprintf("2001:db8:%x:%x::1", number>>16, number&0xffff) // whose limits are far
		a := s.serve(t.Context(), client, registerRoute, body)
		if a.status == http.StatusBadRequest || a.status == http.StatusRequestEntityTooLarge {
			return
		}
		var created registration
		if err := json.Unmarshal([]byte(a.body), &created); err != nil || a.status != http.StatusCreated {
			t.Fatalf("POST /user %q: status %d, want 201, 400 or 413: %v: %s", body, a.status, err, a.body)
		}
		s.exec(`DELETE FROM users`) // the next may have the same email
		s.log.text.Reset()
		var typed map[string]any
		json.Unmarshal([]byte(strings.TrimPrefix(body, "\ufeff")), &typed)
		name := strings.TrimSpace(typed["name"].(string))
		email := strings.TrimSpace(typed["email"].(string))
		secret := typed["password"].(string)
		if created.User.Name != name || created.User.Email != email || !utf8.ValidString(body) {
			t.Errorf("POST /user %q: %+v, want %q and %q", body, created.User, name, email)
		}
		length := utf8.RuneCountInString(name)
		if length < 1 || length > 100 || forbidden.MatchString(name) || !visible.MatchString(name) ||
			len(email) > 254 || !address.MatchString(email) ||
			len(secret) < 8 || len(secret) > 72 || strings.Contains(secret, "\x00") {
			t.Errorf("POST /user %q was accepted", body)
		}
	})
}

func TestAnEmailRegistersOnceInAnyCase(t *testing.T) {
	each(t, func(t *testing.T, backend string) {
		s := start(t, backend)
		for round := range rounds(3, 100) {
			email := newEmail()
			forms := []string{email, strings.ToUpper(email), " " + email + " ", "U" + email[1:]}
			statuses := make([]int, 8)
			together(len(statuses), func(i int) {
				statuses[i] = s.status("POST /user", credentials(forms[i%len(forms)], password))
			})
			slices.Sort(statuses)
			if !slices.Equal(statuses, []int{201, 409, 409, 409, 409, 409, 409, 409}) {
				t.Errorf("POST /user: statuses %v, want 201 once and else 409", statuses)
			}
			if n := query[int](s, `SELECT count(*) FROM users`); n != round+1 {
				t.Errorf("%d accounts, want %d", n, round+1)
			}
			if backend == "REDIS_URL=" {
				eventually(t, 20*time.Second, "those who lost leave no session", func() bool {
					return query[int](s, `SELECT count(*) FROM sessions`) == round+1
				})
			}
		}
	})
}

func TestAnOutageIs503AndLogged(t *testing.T) {
	email := newEmail()
	for _, tt := range []struct {
		route, email, fails string
		status              int
	}{
		{route: "GET /user", fails: "Get", status: 503},
		{route: "GET /healthz", fails: "Ping", status: 503},
		{route: "DELETE /user/session", fails: "Delete", status: 503},
		{route: registerRoute, email: newEmail(), fails: "Create", status: 503},
		{route: signInRoute, email: email, fails: "Create", status: 503},
		{route: signInRoute, email: email, fails: "Delete", status: 503},
		// The account is made; the session that could not be ended lives on beside the new one.
		{route: registerRoute, email: newEmail(), fails: "Delete", status: 201},
	} {
		for msg, cause := range map[string]error{
			"store out of reach": fmt.Errorf("%w: no route to host", errUnavailable),
			"store refuses":      &refusedError{server: "the host", text: "NOPERM"},
		} {
			what := fmt.Sprintf("%s, %s at %s", tt.route, msg, tt.fails)
			s := newUnit(t, unitConfig{})
			s.expectErrors()
			var first, second registration
			a := s.request(t.Context(), oneAddr, registerRoute, email, password)
			json.Unmarshal([]byte(a.body), &first)
			failures := 0
			s.trouble = func(method string) error { // the first call fails
				if method != tt.fails || failures > 0 {
					return nil
				}
				failures++
				return cause
			}
			a = s.request(t.Context(), oneAddr, tt.route, tt.email, password, cookie(first.SessionID))
			json.Unmarshal([]byte(a.body), &second)
			s.server.drain(t.Context())
			made := tt.status == 201
			if a.status != tt.status || (a.cookie != nil) != made || strings.Contains(a.body, "host") {
				t.Errorf("%s: status %d, %v, want %d: %s", what, a.status, a.cookie, tt.status, a.body)
			}
			line := s.log.find(t, msg)
			counted := s.server.metrics()["session_store_errors_total"]
			if line["level"] != "ERROR" || line["store"] != "sessions" || line["err"] != cause.Error() ||
				counted != int64(1) || failures != 1 {
				t.Errorf("%s: log line %v, %v errors counted of %d, want 1", what, line, counted, failures)
			}
			want := []string{first.SessionID}
			if made {
				want = append(want, second.SessionID)
				slices.Sort(want)
			}
			if ids := s.sessions.ids(); !slices.Equal(ids, want) {
				t.Errorf("%s: sessions %v, want %v", what, ids, want)
			}
			n := query[int](s.service, `SELECT count(*) FROM users WHERE email = ?`, tt.email)
			if tt.email != email && (n == 1) != made {
				t.Errorf("%s: %d accounts, want one: %t", what, n, made)
			}
		}
	}
}

func TestAPanicIsAnswered500AndLogged(t *testing.T) {
	log := &logBuffer{}
	s := newServer(serverConfig{}, nil, nil, slog.New(slog.NewJSONHandler(log, nil))) // without a store
	for range 3 {
		r := httptest.NewRequest("GET", "/user", nil)
		setHeader(r, cookie(newUUID()))
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		if a, _ := readReply(t, "GET /user", w.Result()); a.status != 500 {
			t.Errorf("GET /user: status %d, want 500", a.status)
		}
	}
	lines := log.lines("request failed") // at most one a second
	stack, _ := lines[0]["err"].(string)
	if len(lines) != 1 || lines[0]["path"] != "/user" || !strings.Contains(stack, "handlers.go") {
		t.Errorf("log lines %v, want one, with the path and the stack", lines)
	}
}

// ---------------------------------------------------------------------------------------------------
// The API: sessions and cookies.

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
		fixed := newUUID()
		s.signIn(email, cookie(fixed))
		s.want(401, fixed) // a client does not choose its session id
		for body, want := range map[string]struct{ signIn, register int }{
			credentials(email, "wrong password"): {signIn: 401, register: 409},
			credentials(newEmail(), "wrong"):     {signIn: 401, register: 400},
			`{}`:                                 {signIn: 400, register: 400},
		} {
			signIn := s.status("POST /user/signin", body, cookie(third))
			register := s.status("POST /user", body, cookie(third))
			if signIn != want.signIn || register != want.register {
				t.Errorf("POST %s: status %d and %d, want %+v", body, signIn, register, want)
			}
			s.want(200, third) // what is refused ends nothing
		}
	})
}

func TestCookiesFollowTheConfiguration(t *testing.T) {
	t.Parallel()
	s := start(t, "COOKIE_SECURE=false", "SESSION_TTL=90s")
	for route, maxAge := range map[string]string{"POST /user": "90", "DELETE /user/session": "0"} {
		a := s.ask(route, credentials(newEmail(), password))
		got, want := a.header.Get("Set-Cookie"), "; Path=/; Max-Age="+maxAge+"; HttpOnly; SameSite=Lax"
		if !strings.HasSuffix(got, want) {
			t.Errorf("%s: Set-Cookie: %s, want %s", route, got, want)
		}
	}
	left := time.Until(time.UnixMilli(query[int64](s, `SELECT expires_at FROM sessions`)))
	if left < 30*time.Second || left > 90*time.Second {
		t.Errorf("the session ends in %v, want 90 s", left)
	}
}

func TestOfSeveralCookiesTheFirstThatIsAUUIDCounts(t *testing.T) {
	s := newUnit(t, unitConfig{})
	calls := 0
	s.trouble = func(string) error { calls++; return nil }
	id := newUUID()
	type effect struct{ status, calls int }
	for want, headers := range map[effect][]string{
		{200, 1}: {cookie(id), cookie(`"` + id + `"`), cookie("junk; a=b;  session-id=" + id),
			cookie(id + "; session-id=" + newUUID()), cookie("junk") + "\nCookie: x=y\n" + cookie(id),
			"Cookie: session-id =" + id},
		{401, 1}: {cookie(newUUID() + "; session-id=" + id)},
		{401, 0}: {"Accept: */*", "Cookie: Session-Id=" + id + "; xsession-id=" + id, cookie(""), cookie("*"),
			cookie(id[:35]), cookie(id + "0"), cookie("{" + id[1:]), cookie(strings.Replace(id, "-", "0", 1)),
			cookie(id[:35] + "g"), cookie(`"` + id), cookie("../../etc/passwd"),
			cookie(strings.Repeat("a", 8000))},
	} {
		for _, header := range headers {
			for route, status := range map[string]int{"GET /user": want.status, "DELETE /user/session": 204} {
				s.sessions.Create(t.Context(), id, testUser(1), time.Hour)
				calls = 0
				a := s.serve(t.Context(), oneAddr, route, "", strings.Split(header, "\n")...)
				if a.status != status || calls != want.calls {
					t.Errorf("%s %.90q: status %d, the store is asked %d times, want %d, %d",
						route, header, a.status, calls, status, want.calls)
				}
			}
		}
	}
}

func TestWhatAClientThatLeftAskedForLeavesNoHalves(t *testing.T) {
	t.Parallel()
	old := newUUID()
	for _, tt := range []struct {
		name, route, cookie string
		hasRival            bool // who registers meanwhile
		sessions            int  // new ones
		next                int  // status of a failure after it and 99 others: whether it counts
	}{
		{name: "registered", route: registerRoute, sessions: 1, next: 429},
		{name: "cannot end the old one", route: registerRoute, cookie: cookie(old), sessions: 1, next: 429},
		{name: "loses the race", route: registerRoute, hasRival: true, next: 429},
		{name: "signs in, cannot end the old one", route: signInRoute, cookie: cookie(old), next: 401},
	} {
		inVirtualTime(t, tt.name, func(t *testing.T) {
			s := newUnit(t, unitConfig{})
			s.failures(99, "#@example.com")
			s.sessions.Create(s.Context(), old, testUser(1), time.Hour)
			if tt.route == signInRoute {
				s.addAccount(adaEmail, bcrypt.MinCost)
			}
			ctx, hangUp := context.WithCancel(s.Context())
			s.trouble = func(method string) error {
				if method == "Create" && tt.hasRival {
					s.addAccount(adaEmail, bcrypt.MinCost)
				}
				hangUp()
				return nil
			}
			a := s.request(ctx, oneAddr, tt.route, adaEmail, password, tt.cookie)
			s.server.drain(s.Context())
			accounts := query[int](s.service, `SELECT count(*) FROM users`)
			if sessions := len(s.sessions.ids()) - 1; accounts != 1 || sessions != tt.sessions {
				s.Errorf("status %d, %d accounts and %d new sessions, want 1 and %d",
					a.status, accounts, sessions, tt.sessions)
			}
			s.wantSignIn(tt.next, newEmail(), wrongPassword)
		})
	}
}

// ---------------------------------------------------------------------------------------------------
// The API: connections.

func TestRequestsAreAnsweredInOrderHoweverTheyArrive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dial := newUnit(t, unitConfig{}).listen()
		text := httpText("GET /"+strings.Repeat("x", 4100), "") + httpText("GET /healthz", "") +
			httpText("POST /user/signin", "{}") + httpText("GET /user", "") +
			httpText("DELETE /user/session", "")
		for split := 4090; split < len(text); split++ { // net/http's buffer has 4,096 bytes
			conn := dial()
			go func() {
				io.WriteString(conn, text[:split])
				synctest.Wait()
				io.WriteString(conn, text[split:])
			}()
			answers := bufio.NewReader(conn)
			for _, want := range []int{404, 200, 400, 401, 204} {
				if a := readHTTP(t, "a request in two pieces", answers); a.status != want {
					t.Fatalf("split at %d: status %d, want %d", split, a.status, want)
				}
			}
			conn.Close()
		}
	})
}

func TestAnAnswerBeforeTheBodysEndArrives(t *testing.T) {
	t.Parallel()
	conn := start(t).dialRaw()
	go io.WriteString(conn, httpText("POST /user", strings.Repeat(" ", 1<<20)))
	answers := bufio.NewReader(conn)
	a := readHTTP(t, "POST /user", answers)
	if _, err := answers.ReadByte(); a.status != 413 || err != io.EOF {
		t.Errorf("status %d and then %v, want 413 and the end: a reset may destroy the answer", a.status, err)
	}
}

func TestClientsHaveTheirTime(t *testing.T) {
	body := credentials("nobody@example.com", password)
	head := strings.TrimSuffix(httpText("POST /user/signin", body), body)
	get := httpText("GET /healthz", "")
	for _, tt := range []struct {
		name   string
		sent   string        // at once
		slowly string        // then, a byte a second
		bcrypt time.Duration // that it takes
		unread time.Duration // before the client reads
		answer string
		cut    time.Duration // when the service closes the connection
	}{
		{name: "for the first byte", cut: 5 * time.Second},
		{name: "for headers", sent: "GET /user HTTP/1.1\r\nX: ", slowly: get, cut: 5 * time.Second},
		{name: "for a body", sent: head, slowly: body, answer: "HTTP/1.1 400 ", cut: 10 * time.Second},
		{name: "for idling", sent: get, answer: "HTTP/1.1 200 ", cut: 2 * time.Minute},
		{name: "to read the answer", sent: get, unread: 29 * time.Second,
			answer: "HTTP/1.1 200 ", cut: 149 * time.Second},
		{name: "but not for ever", sent: get, unread: 31 * time.Second, cut: 31 * time.Second},
		{name: "for body and bcrypt", sent: head + body[:len(body)-9], slowly: body[len(body)-9:],
			bcrypt: 12 * time.Second, answer: "HTTP/1.1 401 ", cut: 21*time.Second + 2*time.Minute},
	} {
		inVirtualTime(t, tt.name, func(t *testing.T) {
			s := newUnit(t, unitConfig{})
			s.bcrypt.before = func(string) { time.Sleep(tt.bcrypt) }
			conn := s.listen()()
			begin := time.Now()
			var sending sync.WaitGroup
			defer sending.Wait()
			sending.Go(func() {
				_, err := io.WriteString(conn, tt.sent)
				for i := 0; i < len(tt.slowly) && err == nil; i++ {
					time.Sleep(time.Second)
					_, err = io.WriteString(conn, tt.slowly[i:i+1])
				}
			})
			time.Sleep(tt.unread)
			text, _ := io.ReadAll(conn)
			if d := time.Since(begin); d < tt.cut || d > tt.cut+time.Second {
				s.Errorf("cut after %v, want %v", d, tt.cut)
			}
			if !bytes.HasPrefix(text, []byte(tt.answer)) || (len(text) > 0) != (tt.answer != "") {
				s.Errorf("answer %q, want %q", text, tt.answer)
			}
		})
	}
}

func TestClientsThatLeaveAtAnyStageHoldNobodyUp(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.expectErrors() // a slow disk may not take the last accounts in time
	request := httpText("POST /user", credentials(newEmail(), password))
	for n := range len(request) + 20 { // the last ones before their answer
		conn := s.dialRaw()
		io.WriteString(conn, request[:min(n, len(request))])
		conn.Close()
	}
	eventually(t, 20*time.Second, "somebody who stays can register", func() bool {
		return s.status("POST /user", credentials(newEmail(), password)) == 201
	})
}

// Whether net/http watches a connection is seen by whether it takes a byte while the handler runs.
func TestTheWatchIsSparedForLookupsAndKeptForSignIns(t *testing.T) {
	email := newEmail()
	lookup := httpText("GET /user", "", cookie(newUUID()))
	signIn := httpText("POST /user/signin", credentials(email, password))
	for _, tt := range []struct {
		what, before, request string
		status                int
		watched               bool
	}{
		{what: "a sign-in after a lookup", before: lookup, request: signIn, status: 200, watched: true},
		{what: "a lookup after a sign-in", before: signIn, request: lookup, status: 401, watched: false},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := newUnit(t, unitConfig{})
			s.request(t.Context(), oneAddr, registerRoute, email, password)
			conn := s.listen()()
			answers := bufio.NewReader(conn)
			io.WriteString(conn, tt.before)
			readHTTP(t, "before "+tt.what, answers)
			synctest.Wait() // or the next request may come before its watch has ended
			goOn := make(chan struct{})
			s.trouble = func(string) error { <-goOn; return nil }
			io.WriteString(conn, tt.request)
			synctest.Wait()
			next := httpText("GET /nowhere", "")
			conn.SetWriteDeadline(time.Now().Add(time.Second))
			n, err := io.WriteString(conn, next[:1])
			if (n == 1) != tt.watched {
				t.Errorf("%s that runs: a byte is read: %t, %v, want %t", tt.what, n == 1, err, tt.watched)
			}
			conn.SetWriteDeadline(time.Time{})
			close(goOn)
			a := readHTTP(t, tt.what, answers)
			io.WriteString(conn, next[n:])
			if b := readHTTP(t, "after "+tt.what, answers); a.status != tt.status || b.status != 404 {
				t.Errorf("%s and what follows: status %d and %d, want %d and 404",
					tt.what, a.status, b.status, tt.status)
			}
		})
	}
}

// ---------------------------------------------------------------------------------------------------
// Behind a proxy.

func TestClientAddress(t *testing.T) {
	const tens, peer = "10.0.0.0/8", "10.1.2.3:5"
	for _, tt := range []struct {
		proxies, peer string
		forwarded     []string
		want          string
		named         bool
	}{
		{"", "192.0.2.1:5", []string{"198.51.100.7"}, "192.0.2.1", false}, // nobody is trusted
		{tens, "192.0.2.1:5", []string{"198.51.100.7"}, "192.0.2.1", false},
		{tens, peer, nil, "10.1.2.3", false},
		{tens, peer, []string{"198.51.100.7"}, "198.51.100.7", true},
		{tens, "[::ffff:10.1.2.3]:5", []string{"::ffff:198.51.100.7"}, "198.51.100.7", true},
		{"::ffff:10.0.0.0/104", peer, []string{"198.51.100.7"}, "198.51.100.7", true},
		{"fe80::/10", "[fe80::1%eth0]:5", []string{"203.0.113.9"}, "203.0.113.9", true},
		// What a client claims of itself is further left.
		{tens, peer, []string{"203.0.113.9", "203.0.113.8, 198.51.100.7"}, "198.51.100.7", true},
		{tens + ", fd00::/8", peer, []string{"10.4.4.4,2001:db8::1, fd00::1,10.9.9.9"}, "2001:db8::1", true},
		{tens, peer, []string{"10.2.2.2,10.3.3.3"}, "10.2.2.2", true},
		{tens, peer, []string{"203.0.113.9, junk"}, "10.1.2.3", false},
		{tens, peer, []string{"junk, 203.0.113.9"}, "203.0.113.9", true},
		{tens, peer, []string{""}, "10.1.2.3", false},
		{tens, peer, []string{"198.51.100.7, 203.0.113.5:4711 , 10.2.2.2:80"}, "203.0.113.5", true},
		{tens, peer, []string{"[2001:db8::5]"}, "2001:db8::5", true},
		{tens, peer, []string{"[::ffff:198.51.100.7]:4711"}, "198.51.100.7", true},
		{tens, peer, []string{`"[2001:db8::5]:4711"`}, "2001:db8::5", true},
	} {
		env := map[string]string{"TRUSTED_PROXIES": tt.proxies}
		cfg, err := loadConfig(func(name string) string { return env[name] })
		if err != nil {
			t.Fatal(err)
		}
		s := newServer(cfg.server, nil, nil, slog.New(slog.DiscardHandler))
		got := s.clientOf(&http.Request{RemoteAddr: tt.peer,
			Header: http.Header{"X-Forwarded-For": tt.forwarded}})
		if got.addr.String() != tt.want || got.named != tt.named {
			t.Errorf("peer %s, X-Forwarded-For %q, trusted %q: %s, named %v, want %s, %v",
				tt.peer, tt.forwarded, tt.proxies, got.addr, got.named, tt.want, tt.named)
		}
	}
}

func TestAProxyThatNobodyTrustsIsWarnedOfOnce(t *testing.T) {
	t.Parallel()
	const peer, forwarded = "peer 10.1.2.3", "X-Forwarded-For: 203.0.113.5"
	for _, first := range []string{registerRoute, signInRoute} {
		s := newUnit(t, unitConfig{})
		session := newUUID()
		s.sessions.Create(t.Context(), session, testUser(1), time.Hour)
		for _, tt := range []struct {
			client, route, header string
			warnings              int // so far
		}{
			{peer, "GET /user", forwarded, 0},
			{peer, "DELETE /user/session", forwarded, 0},
			{peer, "GET /healthz", forwarded, 0},
			{peer, first, "Accept: */*", 0},
			{oneAddr, first, "Accept: */*", 0},
			{"junk", first, "Accept: */*", 0}, // says the trusted proxy
			{peer, first, forwarded, 1},
			{"peer 203.0.113.9", first, forwarded, 1},
		} {
			s.request(t.Context(), tt.client, tt.route, newEmail(), wrongPassword, cookie(session), tt.header)
			if n := strings.Count(s.log.String(), `"level":"WARN"`); n != tt.warnings {
				t.Errorf("after %s of %s: %d warnings, want %d:\n%s", tt.route, tt.client, n, tt.warnings,
					s.log)
			}
		}
		_, line, _ := strings.Cut(s.log.String(), `"level":"WARN"`)
		line, _, _ = strings.Cut(line, "\n")
		if !strings.Contains(line, "TRUSTED_PROXIES") || !strings.Contains(line, `"client":"10.1.2.3"`) {
			t.Errorf("the warning names neither TRUSTED_PROXIES nor the peer: %s", line)
		}
	}
}

// A body that is announced may not come, or be a request itself.
func TestWhatNeedsNoBodyIsAnsweredAtOnce(t *testing.T) {
	t.Parallel()
	s := start(t)
	_, id := s.register(newEmail())
	smuggled := httpText("DELETE /user/session", "", cookie(id))
	for _, body := range []string{
		"Content-Length: 77\r\n\r\n",
		"Content-Length: 1000000\r\n\r\n",
		"Content-Length: 77\r\nExpect: 100-continue\r\n\r\n",
		"Transfer-Encoding: chunked\r\n\r\n",
		"Transfer-Encoding: chunked\r\n\r\n5\r\nabc",
		"Content-Length: 1000\r\n\r\n" + smuggled,
		"Content-Length: 2\r\n\r\n{}" + smuggled,
	} {
		for route, want := range map[string]int{
			"GET /user": 200, "HEAD /user": 200, "DELETE /user/session": 204, "PUT /user": 405, "GET /": 404,
		} {
			what := fmt.Sprintf("%s %.60q", route, body)
			method, _, _ := strings.Cut(route, " ")
			own := id
			if method == "DELETE" {
				own = newUUID()
			}
			conn := s.dialRaw()
			elapsed := startWatch()
			io.WriteString(conn, route+" HTTP/1.1\r\nHost: x\r\n"+cookie(own)+"\r\n"+body)
			answers := bufio.NewReader(conn)
			a, err := http.ReadResponse(answers, &http.Request{Method: method})
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			text, _ := io.ReadAll(a.Body)
			if took := elapsed(); a.StatusCode != want || !a.Close || took > 2*time.Second {
				t.Errorf("%s: status %d after %v, close %t, want %d at once, and close: %s",
					what, a.StatusCode, took, a.Close, want, text)
			}
			conn.(*net.TCPConn).CloseWrite()
			if rest, _ := io.ReadAll(answers); len(rest) > 0 {
				t.Errorf("%s: a second answer: %s", what, rest)
			}
		}
	}
	s.want(200, id)
}

func TestHeadersMayHave48kB(t *testing.T) {
	t.Parallel()
	s := start(t)
	const get = "GET /user HTTP/1.1\r\nHost: x\r\n"
	const post = "POST /user HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" +
		"Content-Length: 16000\r\n"
	padded := func(request string, size int) string {
		return request + "X: " + strings.Repeat("x", size-len(request+"X: \r\n\r\n")) + "\r\n\r\n"
	}
	for text, want := range map[string]int{
		padded(get, 48<<10): 401,
		padded(post, 48<<10) + strings.Repeat(" ", 16000): 400,
		padded(get, 64<<10): 431,
	} {
		conn := s.dialRaw()
		go io.WriteString(conn, text)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Errorf("%.90q: %v", text, err)
		} else if resp.StatusCode != want {
			t.Errorf("%.90q: status %d, want %d", text, resp.StatusCode, want)
		}
	}
}

func TestBrowsersOnOtherOriginsAreRefused(t *testing.T) {
	t.Parallel()
	s := start(t)
	for header, refused := range map[string]bool{
		"Sec-Fetch-Site: cross-site":   true,
		"Sec-Fetch-Site: same-site":    true, // a sister domain
		"Origin: https://evil.example": true,
		"Origin: http://127.0.0.1:1":   true, // another port
		"Origin: null":                 true,
		"Sec-Fetch-Site: same-origin":  false,
		"Origin: " + s.url:             false,
		"User-Agent: curl":             false,
	} {
		_, id := s.register(newEmail())
		s.wantStatus(200, "GET /user", "", header, cookie(id)) // reading is safe
		for _, route := range []string{"POST /user", "POST /user/signin", "DELETE /user/session"} {
			a := s.ask(route, "", header, cookie(id))
			told := strings.Contains(a.body, "another origin") && strings.Contains(a.body, "Host")
			if (a.status == 403) != refused || refused && !told {
				t.Errorf("%s %s: status %d, want 403 that names origin and Host: %t: %s", route, header,
					a.status, refused, a.body)
			}
		}
		s.want(map[bool]int{true: 200, false: 401}[refused], id)
	}
}

// ---------------------------------------------------------------------------------------------------
// Configuration.

func TestWrongConfigurationIsRefused(t *testing.T) {
	const none = "none is allowed"
	var first []string // wrong value of each row
	for _, tt := range []struct {
		name   string
		want   string // what is allowed; it is in the message, and so is what is wrong
		wrong  string // "": the value
		values []string
	}{
		{name: "ADDR", want: "host:port", values: []string{"8080", ":http-alt", ":65536"}},
		{name: "PORT", want: "1 to 65535", values: []string{"0", "65536", ":3000"}},
		{name: "DB_PATH", want: "path of a file", values: []string{":memory:", "file:x?mode=memory"}},
		{name: "SESSION_TTL", want: "whole seconds, 1s or", values: []string{"7d", "1500ms", "0s", "-1h"}},
		{name: "BCRYPT_COST", want: "10 to 15", values: []string{"9", "16", "twelve"}},
		{name: "COOKIE_SECURE", want: "true or false", values: []string{"yes"}},
		{name: "DEBUG_ADDR", want: "host:port", values: []string{"6060"}},
		{name: "SHUTDOWN_DELAY", want: "0s to 60s", values: []string{"61s", "-1s", "5"}},
		{name: "LOG_LEVEL", want: "debug, info, warn or error", values: []string{"verbose", "INFO"}},
		{name: "TRUSTED_PROXIES", want: "such as 10.0.0.0/8", values: []string{"10.0.0.1"}},
		{name: "TRUSTED_PROXIES", want: "10.0.0.0/8", wrong: `"proxy"`, values: []string{"10.0.0.0/8,proxy"}},
		{name: "TRUSTED_PROXIES", want: "as IPv4 or IPv6", values: []string{"::ffff:0.0.0.0/90"}},
		{name: "REDIS_URL", want: "redis://[", wrong: "scheme", values: []string{"s3c:6379", "http://s3c:1"}},
		{name: "REDIS_URL", want: "redis://[", wrong: "no such URL", values: []string{"redis://s3c st:6379"}},
		{name: "REDIS_URL", want: "redis://[", wrong: "login", values: []string{"redis://s3c@h"}},
		{name: "REDIS_URL", want: "]/primary", wrong: "primary",
			values: []string{"redis-sentinel://:s3c@a/"}},
		{name: "REDIS_URL", want: "redis://[", wrong: "no such URL",
			values: []string{"redis://:s3c@h\r", "redis://:s3c@h "}},
		{name: "REDIS_URL", want: "redis://[", wrong: "scheme", values: []string{`"redis://:s3c@h"`}},
		{name: "REDIS_URL", want: "redis://[", wrong: "REDIS_URL", values: []string{
			"redis://:6379", "redis://h:0", "redis://h:65536", "redis://h:s3c", "redis://a,,b",
			"redis://h/s3c", "redis://:s3c%40h:6379/0x", "redis://h/0?db=s3c", "redis://h/-1",
			"redis://u:s3c%@h", "redis://h#s3c", "redis://u:x@s3c@h", "redis://::1", "redis://h:6379:",
			"redis-sentinel://h", "redis-sentinel://h,/m", "redis-sentinel://h/m/s3c", "redis-sentinel:///m",
			"redis-sentinel://u:26/s3c@h:1/1"}},
		// What an env file with CRLF, or with quotes in it, would make of a path.
		{name: "DB_PATH", want: none, wrong: "control",
			values: []string{"/x\r", "\n/x", "/\x00x", "/x\u0085"}},
		{name: "DB_PATH", want: none, wrong: "white space", values: []string{"/x ", " /x", "/x\u00a0"}},
		{name: "DB_PATH", want: none, wrong: "quotes", values: []string{`"/x"`, "'/x'"}},
	} {
		for _, value := range tt.values {
			wrong := cmp.Or(tt.wrong, fmt.Sprintf("%q", value))
			status, _, message := runWith(t.Context(), t, nil, tt.name+"="+value)
			if status != 2 || strings.Count(message, "\n") != 1 ||
				!strings.HasPrefix(message, tt.name+": ") ||
				!strings.Contains(message, tt.want) || !strings.Contains(message, wrong) {
				t.Errorf("%s=%s: exit status %d, want 2, %q and %q in: %s",
					tt.name, value, status, tt.want, wrong, message)
			}
			if strings.Contains(message, "s3c") {
				t.Errorf("%s=%s: the message tells some of it: %s", tt.name, value, message)
			}
		}
		first = append(first, tt.name+"="+tt.values[0])
	}
	status, _, message := runWith(t.Context(), t, nil, first...)
	lines := regexp.MustCompile(`(?m)^[A-Z_]+: `).FindAllString(message, -1)
	if status != 2 || len(lines) != 11 {
		t.Errorf("all wrong: exit status %d, want 2 and a line for each of 11 variables: %s", status, message)
	}
}

func TestConfiguration(t *testing.T) {
	for _, tt := range []struct{ vars, want string }{
		{
			vars: "ADDR=,DB_PATH=,PORT=,SESSION_TTL=,BCRYPT_COST=,COOKIE_SECURE=,TRUSTED_PROXIES=," +
				"DEBUG_ADDR=,SHUTDOWN_DELAY=,LOG_LEVEL=",
			want: "[:8080 users.db <nil> 168h0m0s 12 true []  0s INFO]",
		},
		{
			vars: "ADDR=:0,DB_PATH=x,REDIS_URL=redis://h,SESSION_TTL=1s,BCRYPT_COST=10," +
				"TRUSTED_PROXIES=::/0,LOG_LEVEL=debug",
			want: "[:0 x redis://h:6379/0 1s 10 true [::/0]  0s DEBUG]",
		},
		{
			vars: "ADDR=[::1]:65535,DB_PATH=/my users?#%.db,SESSION_TTL=87600h,BCRYPT_COST=15," +
				"DEBUG_ADDR=:6060,COOKIE_SECURE=false",
			want: "[[::1]:65535 /my users?#%.db <nil> 87600h0m0s 15 false [] :6060 0s INFO]",
		},
		{
			vars: "ADDR=,DB_PATH=x,PORT=65535,LOG_LEVEL=warn,TRUSTED_PROXIES=::ffff:10.0.0.0/104," +
				"SHUTDOWN_DELAY=60s",
			want: "[:65535 x <nil> 168h0m0s 12 true [10.0.0.0/8]  1m0s WARN]",
		},
		{
			vars: "ADDR=h:1,DB_PATH=x,PORT=3000,LOG_LEVEL=error,SHUTDOWN_DELAY=1500ms",
			want: "[h:1 x <nil> 168h0m0s 12 true []  1.5s ERROR]",
		},
	} {
		c, err := loadConfig(environ(t, strings.Split(tt.vars, ",")).get)
		got := fmt.Sprint([]any{c.addr, c.dbPath, c.redis, c.server.sessionTTL, c.server.bcryptCost,
			c.server.cookieSecure, c.server.trustedProxies, c.debugAddr, c.stopDelay, c.logLevel})
		if err != nil || got != tt.want {
			t.Errorf("%s: %v, got %s, want %s", tt.vars, err, got, tt.want)
		}
	}
}

func TestRedisURLs(t *testing.T) {
	for url, want := range map[string]struct {
		addrs string
		shown string
	}{
		"redis://localhost":                    {"localhost:6379", "redis://localhost:6379/0"},
		"redis://h:7/":                         {"h:7", "redis://h:7/0"},
		"redis://u:p%40w@h:7/2":                {"h:7", "redis://h:7/2"},
		"redis://:p:w@h/15":                    {"h:6379", "redis://h:6379/15"},
		"redis://:@h":                          {"h:6379", "redis://h:6379/0"},
		"redis://u:@h":                         {"h:6379", "redis://h:6379/0"},
		"rediss://u%40x:p%2Fw@[::1]":           {"[::1]:6379", "rediss://[::1]:6379/0"},
		"rediss://[fe80::1%25e0]":              {"[fe80::1%e0]:6379", "rediss://[fe80::1%25e0]:6379/0"},
		"redis-sentinel://a:1,b,c:3/m":         {"a:1 b:26379 c:3", "redis-sentinel://a:1,b:26379,c:3/m"},
		"redis-sentinel://u:p@a/my-master.1/3": {"a:26379", "redis-sentinel://a:26379/my-master.1/3"},
	} {
		got, err := parseRedisURL(url)
		if err != nil || strings.Join(got.addrs, " ") != want.addrs || got.String() != want.shown {
			t.Errorf("%s: %v, %v, want %v", url, got, err, want)
		}
	}
}

func FuzzRedisURL(f *testing.F) {
	const marker = "Zq7" // stands for any part of the text
	for _, text := range []string{
		"redis://localhost", "redis://u:p%40ss@h:1/2", "rediss://:p@[fe80::1]:6379/0", "redis://ho st:6379",
		"redis-sentinel://:p@a,b:26380/my%2Fprimary/3", "redis://:s3cret%40redis:6379/0x", "redis://a,b",
		"redis://h:6379:", "redis://app@h", "redis://app:@h/-1", "redis://h?a#b", "redis-sentinel://h/%zz",
		"://",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, whole string) {
		if len(whole) > 100 || strings.Contains(whole, marker) {
			t.Skip()
		}
		texts := []string{whole}
		for at := range len(whole) + 1 {
			texts = append(texts, whole[:at]+marker+whole[at:])
		}
		for _, text := range texts {
			target, err := parseRedisURL(text)
			if err != nil {
				if strings.Contains(err.Error(), marker) {
					t.Errorf("%q: the error tells a part of it: %v", text, err)
				}
				continue
			}
			shown := target.String()
			if strings.Contains(target.user+target.password, marker) && strings.Contains(shown, marker) {
				t.Errorf("%q is shown as %q", text, shown)
			}
			target.user = ""
			target.password = ""
			again, err := parseRedisURL(shown)
			if err != nil || !reflect.DeepEqual(again, target) {
				t.Errorf("%q is shown as %q, which is %+v, %v, want %+v", text, shown, again, err, target)
			}
		}
	})
}

// README's table and -h cannot drift apart.
func TestHelpIsREADMEsTable(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	want := ""
	row := regexp.MustCompile("(?m)^\\| `([A-Z_]+)` \\| (.*) \\| (.*) \\|$")
	for _, cells := range row.FindAllStringSubmatch(string(readme), -1) {
		text := fmt.Sprintf("  %s (default %s)\n    \t%s\n", cells[1], cells[2], cells[3])
		want += strings.ReplaceAll(text, "`", "")
	}
	_, got, _ := runWith(t.Context(), t, []string{"-h"}, "PORT=3000", "DB_PATH=elsewhere")
	if _, variables, _ := strings.Cut(got, "environment variables:\n"); variables != want || want == "" {
		t.Errorf("-h prints:\n%s\nREADME has:\n%s", variables, want)
	}
	for _, flag := range []string{"-healthcheck\n    \task", "-version\n    \tprint"} {
		if !strings.Contains(got, flag) {
			t.Errorf("-h does not describe %q:\n%s", flag, got)
		}
	}
}

func TestTheRuntimeIsTunedUnlessTheEnvironmentSays(t *testing.T) {
	cores := runtime.GOMAXPROCS(0)
	before := debug.SetGCPercent(100)
	t.Cleanup(func() {
		runtime.GOMAXPROCS(cores)
		debug.SetGCPercent(before)
	})
	type tuning struct{ procs, percent int }
	for value, want := range map[string]tuning{"1": {cores, 100}, "": {2 * cores, 300}} {
		runtime.GOMAXPROCS(cores)
		tuneRuntime(func(string) string { return value })
		got := tuning{runtime.GOMAXPROCS(0), debug.SetGCPercent(100)}
		if got != want {
			t.Errorf("GOMAXPROCS=%s, GOGC=%[1]s: set to %v, want %v", value, got, want)
		}
	}
}

// causeOfTheEnd returns the error in the one line of a log that tells why the service could not run.
func causeOfTheEnd(t *testing.T, log string) string {
	t.Helper()
	var line struct{ Level, Msg, Err string }
	err := json.Unmarshal([]byte(log), &line)
	if err != nil || line.Level != "ERROR" || line.Msg != "cannot serve" {
		t.Errorf("%v, stderr %s, want one line of JSON", err, log)
	}
	return line.Err
}

func TestExitStatus(t *testing.T) {
	t.Parallel()
	well := strings.TrimPrefix(start(t).url, "http://")
	_, port, _ := net.SplitHostPort(well)
	unwell := start(t, "REDIS_URL=redis://127.0.0.1:"+freePort())
	unwell.expectErrors()
	unwellAddr := strings.TrimPrefix(unwell.url, "http://")
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	const usage = "usage: session-storage [-healthcheck | -version | -h]"
	for _, tt := range []struct {
		args, vars     string
		status         int
		stdout, stderr string
	}{
		{args: "-version", vars: "BCRYPT_COST=broken", stdout: runtime.Version()},
		{args: "--version", stdout: "session-storage "},
		{args: "-h", vars: "BCRYPT_COST=broken", stdout: usage},
		{args: "-version --help", stdout: usage},
		{args: "-port 1", status: 2, stderr: usage},
		{args: "serve", status: 2, stderr: usage},
		{args: "-version x", status: 2, stderr: usage},
		{args: "-healthcheck", vars: "BCRYPT_COST=broken", status: 1, stderr: "BCRYPT_COST"},
		{args: "-healthcheck", vars: "ADDR=" + well},
		{args: "-healthcheck", vars: "ADDR=:" + port},
		{args: "-healthcheck", vars: "ADDR=0.0.0.0:" + port},
		{args: "-healthcheck", vars: "ADDR=,PORT=" + port},
		{args: "-healthcheck", vars: "ADDR=" + unwellAddr, status: 1, stderr: "503"},
		{args: "-healthcheck", vars: "ADDR=" + silent.Addr().String(), status: 1, stderr: "exceeded"},
		{args: "-healthcheck", vars: "ADDR=127.0.0.1:" + freePort(), status: 1, stderr: "refused"},
		{args: "-healthcheck", vars: "ADDR=[fe80::1%none]:" + freePort(), status: 1, stderr: "dial"},
		{vars: "ADDR=" + well, status: 1, stderr: fmt.Sprintf("ADDR=%q: ", well)},
		{vars: "DEBUG_ADDR=" + well, status: 1, stderr: fmt.Sprintf("DEBUG_ADDR=%q: ", well)},
		{vars: "DB_PATH=/no/such/folder/users.db", status: 1, stderr: `DB_PATH="/no/such/folder/users.db": `},
		{vars: "DB_PATH=/", status: 1, stderr: `DB_PATH="/": `},
	} {
		args, vars := strings.Fields(tt.args), strings.Split(tt.vars, ",")
		status, stdout, stderr := runWith(t.Context(), t, args, vars...)
		if tt.args == "" {
			stderr = causeOfTheEnd(t, stderr)
		}
		if status != tt.status ||
			!strings.Contains(stdout, tt.stdout) || (stdout == "") != (tt.stdout == "") ||
			!strings.Contains(stderr, tt.stderr) || (stderr == "") != (tt.stderr == "") {
			t.Errorf("%+v: exit status %d, stdout %s, stderr %s", tt, status, stdout, stderr)
		}
	}
}

// ---------------------------------------------------------------------------------------------------
// Redis: what it is sent, what it holds, who logs in.

// monitored returns what Redis is sent by others than redisDo while do runs, a line for each command.
func monitored(t *testing.T, url string, do func()) (commands []string) {
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
	s := start(t, "REDIS_URL="+r.url(), "LOG_LEVEL=debug")
	s.log.find(t, "session store takes sessions") // of the trial session
	account, id := s.register(newEmail())
	old := newUUID()
	const echo = `"ECHO" nonce`
	create := []string{
		`"MULTI"`,
		`"HSET" "session:NEW" "id" "USER" "name" "Ada Lovelace" "email" "EMAIL" ` +
			`"createdAt" "TIME" "updatedAt" "TIME"`,
		`"EXPIRE" "session:NEW" "604800"`,
		`"EXEC"`,
		echo,
	}
	replace := append(slices.Clone(create), `"DEL" "session:`+old+`"`, echo) // once the new one stands
	nonces := map[string]bool{}
	for _, tt := range []struct {
		route, body, id string
		want            []string
	}{
		{"POST /user", credentials(newEmail(), password), "", create},
		{"POST /user", credentials(newEmail(), password), old, replace},
		{"POST /user/signin", credentials(account.Email, password), "", create},
		{"POST /user/signin", credentials(account.Email, password), old, replace},
		{"POST /user/signin", credentials(account.Email, "wrong password"), old, nil},
		{"GET /user", "", id, []string{`"HGETALL" "session:` + id + `"`, echo}},
		{"GET /user", "", id, []string{`"HGETALL" "session:` + id + `"`, echo}},
		{"GET /user", "", "", nil},
		{"GET /user", "", "no-uuid", nil},
		{"GET /healthz", "", id, []string{echo}},
		{"DELETE /user/session", "", id, []string{`"DEL" "session:` + id + `"`, echo}},
		{"DELETE /user/session", "", "", nil},
	} {
		var a *reply
		got := monitored(t, r.url(), func() { a = s.ask(tt.route, tt.body, cookie(tt.id)) })
		for i, line := range got {
			if nonce, isEcho := strings.CutPrefix(line, `"ECHO" `); isEcho {
				if len(nonce) < 28 || nonces[nonce] {
					t.Errorf("%s: nonce %s is short or was used before", tt.route, nonce)
				}
				nonces[nonce] = true
				got[i] = echo
			}
		}
		var made registration
		json.Unmarshal([]byte(a.body), &made)
		if made.User.ID == "" { // a sign-in answers the user alone
			json.Unmarshal([]byte(a.body), &made.User)
		}
		if a.cookie != nil {
			made.SessionID = a.cookie.Value
		}
		names := strings.NewReplacer("NEW", made.SessionID, "USER", made.User.ID,
			"EMAIL", made.User.Email, "TIME", made.User.CreatedAt)
		if want := names.Replace(strings.Join(tt.want, "\n")); strings.Join(got, "\n") != want {
			t.Errorf("%s sent\n%s\nwant\n%s", tt.route, strings.Join(got, "\n"), want)
		}
	}
}

func TestHashesOfTheOriginal(t *testing.T) {
	t.Parallel()
	url := redisURL(t)
	s := start(t, "REDIS_URL="+url)
	const (
		utc      = "Sun Mar 30 2025 20:00:00 GMT+0000 (Coordinated Universal Time)"
		berlin   = "Sun Mar 30 2025 22:00:00 GMT+0200 (Mitteleuropäische Sommerzeit)"
		tokyo    = "Mon Mar 31 2025 05:00:00 GMT+0900 (日本標準時)"
		brasilia = "Sun Mar 30 2025 17:00:00 GMT-0300 (Brasilia Standard Time)"
		kolkata  = "Mon Mar 31 2025 01:30:00 GMT+0530"
		later    = "2025-03-31T20:00:00.123Z"
		epoch    = "1970-01-01T00:00:00.000Z"
	)
	none := []string{"", ""}
	for _, tt := range []struct {
		fields []any    // beside those of a user; nil for one that is missing
		times  []string // of the user, or none
	}{
		{[]any{"createdAt", utc, "updateAt", berlin}, []string{testTime, testTime}},
		{[]any{"createdAt", tokyo, "updateAt", later}, []string{testTime, later}},
		{[]any{"createdAt", brasilia, "updateAt", kolkata}, []string{testTime, testTime}},
		{[]any{"createdAt", utc, "updateAt", later, "updatedAt", "soon"}, []string{testTime, later}},
		{[]any{"createdAt", tokyo}, []string{testTime, testTime}},
		{[]any{"createdAt", "1743364800000", "updatedAt", later}, []string{later, later}},
		{[]any{"createdAt", "null", "updateAt", "", "updatedAt", "soon"}, []string{epoch, epoch}},
		{nil, []string{epoch, epoch}},
		{[]any{"password", "", "role", "admin", "createdAt", utc}, []string{testTime, testTime}},
		{[]any{"id", nil, "createdAt", utc}, none},
		{[]any{"id", "", "createdAt", utc}, none},
	} {
		id := newUUID()
		want := User{"cmwvz6gao0001s77d1zemt0n6", "Ünï Cödé", "ÄÖ@example.com", tt.times[0], tt.times[1]}
		hash := []any{"session:" + id, "id", want.ID, "name", want.Name, "email", want.Email}
		redisDo(t, url, "HSET", append(hash, tt.fields...)...)
		redisDo(t, url, "EXPIRE", "session:"+id, 600)
		if len(tt.fields) > 1 && tt.fields[1] == nil {
			redisDo(t, url, "HDEL", "session:"+id, tt.fields[0])
		}
		if tt.times[0] == "" {
			s.want(401, id)
		} else if a := s.want(200, id); a.body != userJSON(want) {
			t.Errorf("%s: %s, want %s", tt.fields, a.body, userJSON(want))
		}
		status := s.status("DELETE /user/session", "", cookie(id))
		if left := redisDo(t, url, "EXISTS", "session:"+id); status != 204 || left != any(int64(0)) {
			t.Errorf("%s: DELETE /user/session: status %d, want 204; %d left", tt.fields, status, left)
		}
	}
	text := newUUID()
	redisDo(t, url, "SET", "session:"+text, "no hash", "EX", 600)
	s.want(401, text)
}

const leastLogin = "svc:s3cr%3At%2F%40@" // of a user with the rights that README asks for, and no other

func leastRights(more ...string) []string {
	return append([]string{"--user", "svc", "on", ">s3cr:t/@", "~session:*",
		"+hset", "+expire", "+hgetall", "+del", "+multi", "+exec", "+echo"}, more...)
}

func TestRedisLogin(t *testing.T) {
	t.Parallel()
	host := ownRedisHost(t)
	roled := host.start(t, append(leastRights("+role"), "--user", "default", "off")...)
	monitor := "sentinel monitor accounts 127.0.0.1 " + roled.port + " 1"
	open := host.startSentinel(t, monitor)
	asked := host.startSentinel(t, "requirepass s3cr:t/@", monitor)
	all := host.start(t, "--user", "default", "on", ">s3cr:t/@", "~*", "+@all",
		"--user", "app", "on", "nopass", "~*", "+@all")
	for name, url := range map[string]string{
		"the least rights, by a sentinel":  "redis-sentinel://" + leastLogin + open.addr() + "/accounts",
		"a sentinel that asks for it":      "redis-sentinel://" + leastLogin + asked.addr() + "/accounts",
		"a user without a password":        "redis://app:@" + all.addr(),
		"a password alone, and a database": "redis://:s3cr%3At%2F%40@" + all.addr() + "/3",
	} {
		s := start(t, "REDIS_URL="+url)
		s.secret("s3cr")
		id := s.wantTurns(1)
		inDatabase := strings.HasPrefix(url, "redis://:")
		if inDatabase && redisDo(t, url, "EXISTS", "session:"+id) != any(int64(1)) {
			t.Errorf("%s: the session is not in that database", name)
		}
		s.wantStatus(200, "GET /healthz", "")
		s.wantSignOut(id)
	}
}

func TestTheStartTriesASessionAndLeavesNone(t *testing.T) {
	trial := func(method string, cause error) *unit {
		s := newUnit(t, unitConfig{})
		s.expectErrors()
		s.trouble = failing(method, cause)
		trySession(t.Context(), s.server, s.server.log)
		s.log.end()
		return s
	}
	for _, method := range []string{"Create", "Get", "Delete"} {
		for cause, want := range map[error]string{
			&refusedError{server: "redis:6379", text: "NOPERM"}: "store refuses",
			errUnavailable:        "store out of reach",
			errors.New("a fault"): "request failed",
		} {
			line := trial(method, cause).log.find(t, want)
			if line["err"] != cause.Error() || (line["store"] != "sessions") != (want == "request failed") {
				t.Errorf("%s fails: log line %v, want the cause", method, line)
			}
		}
	}
	lost := trial("Get", errNoSession).log.find(t, "store refuses")
	if cause, _ := lost["err"].(string); !strings.Contains(cause, "not there") {
		t.Errorf("the store has lost the session: log line %v, want the cause", lost)
	}
	if log := trial("Delete", errNoSession).log; log.String() != "" { // it was sent twice
		t.Errorf("the session is gone when it is deleted: logs %s, want nothing", log)
	}
	r := ownRedis(t)
	start(t, "REDIS_URL="+r.url(), "LOG_LEVEL=debug").log.find(t, "session store takes sessions")
	stats := fmt.Sprintf("%s", r.do(t, "INFO", "commandstats"))
	if n := r.do(t, "DBSIZE"); n != int64(0) || !strings.Contains(stats, "cmdstat_hset:calls=1,") {
		t.Errorf("the start leaves %v keys in Redis, having run %s", n, stats)
	}
}

// ---------------------------------------------------------------------------------------------------
// Redis: replies that are believed.

func TestOnlyProvenRepliesAreBelieved(t *testing.T) {
	t.Parallel()
	callOf := map[string]string{"HGETALL": "Get", "DEL": "Delete",
		"MULTI": "Create", "HSET": "Create", "EXPIRE": "Create", "EXEC": "Create"}
	const ( // what becomes of a reply
		fine   = iota // the connection is used on, and all in the flush have what is theirs
		lost          // the connection ends, and what can be sent again is, once
		silent        // the connection ends when it has taken too long, and nothing is sent again
	)
	for _, tt := range []struct {
		name  string
		at    string // the command whose reply is another one
		call  string // to be named where that does not tell
		reply string
		want  error // errUnavailable where the connection ends
		then  int
	}{
		{name: "a lookup", call: "Get"},
		{name: "a deletion", call: "Delete"},
		{name: "a creation", call: "Create"},
		{name: "a long value", at: "HGETALL",
			reply: "*4\r\n$2\r\nid\r\n$1\r\n7\r\n$1\r\nx\r\n" + bulkString(strings.Repeat("x", 300_000))},

		{name: "a number for a hash", at: "HGETALL", reply: ":1\r\n", want: errReplyKind},
		{name: "no array for a hash", at: "HGETALL", reply: "*-1\r\n", want: errReplyKind},
		{name: "half a pair for a hash", at: "HGETALL", reply: "*1\r\n$2\r\nid\r\n", want: errReplyKind},
		{name: "an array for a name", at: "HGETALL", reply: "*2\r\n*0\r\n$1\r\nx\r\n", want: errReplyKind},
		{name: "a number for a value", at: "HGETALL", reply: "*2\r\n$2\r\nid\r\n:1\r\n", want: errReplyKind},
		{name: "text for a deletion", at: "DEL", reply: bulkString("1"), want: errReplyKind},
		{name: "nothing for a creation", at: "EXEC", reply: "*-1\r\n", want: errReplyKind},
		{name: "one reply for a creation", at: "EXEC", reply: "*1\r\n:5\r\n", want: errReplyKind},

		{name: "no session", at: "DEL", reply: ":0\r\n", want: errNoSession},
		{name: "an empty hash", at: "HGETALL", reply: "*0\r\n", want: errNoSession},
		{name: "another type", at: "HGETALL", reply: "-WRONGTYPE of value\r\n", want: errNoSession},
		{name: "a refused lookup", at: "HGETALL", reply: "-NOPERM\r\n", want: errRefused},
		{name: "a refused hash", at: "HSET", reply: "-OOM\r\n", want: errRefused},
		{name: "a refused execution", at: "EXEC", reply: "-EXECABORT\r\n", want: errRefused},
		{name: "an end that is refused", at: "EXEC", reply: "*2\r\n:5\r\n-NOPERM\r\n", want: errRefused},
		{name: "an end that is none", at: "EXEC", reply: "*2\r\n:5\r\n:0\r\n", want: errRefused},

		{name: "garbage", at: "HGETALL", reply: "HTTP/1.1 400 Bad Request\r\n\r\n", then: lost},
		{name: "a kind of another protocol", at: "HGETALL", reply: "%1\r\n", then: lost},
		{name: "a line that ends early", at: "DEL", reply: ":1\n", then: lost},
		{name: "another's nonce", call: "Get", at: "ECHO", reply: bulkString("another's"), then: lost},
		{name: "refused", call: "Ping", at: "ECHO", reply: "-NOPERM\r\n", then: lost},
		{name: "no nonce", call: "Create", at: "ECHO", reply: "$-1\r\n", then: lost},
		{name: "a reply too many", at: "HGETALL", reply: "*0\r\n*0\r\n", then: lost},
		{name: "cut", at: "HGETALL", reply: cutOff, then: lost},
		{name: "a creation that is cut", at: "HSET", reply: cutOff, then: lost},
		{name: "a reply too few", at: "HGETALL", reply: "", then: silent},
		{name: "silence", call: "Create", at: "ECHO", reply: "", then: silent},
	} {
		inVirtualTime(t, tt.name, func(t *testing.T) {
			id := newUUID()
			struck := tt.at != ""
			store, f := fakeSessions(t, func(command []string) string {
				others := command[0] == "HGETALL" && command[1] != sessionKey(id)
				if struck && command[0] == tt.at && !others {
					return tt.reply
				}
				return plainReply(command)
			})
			name := cmp.Or(tt.call, callOf[tt.at])
			call := storeCalls[name]
			want := tt.want
			if want == nil && tt.then != fine {
				want = errUnavailable
			}
			callers := 1
			if tt.then == fine { // neighbours have what is theirs
				callers = 10
			}
			together(callers, func(i int) {
				if i > 0 {
					wantOwn(t, store)
				} else if err := call(store, id); !errors.Is(err, want) {
					t.Errorf("%s: %v, want %v", name, err, want)
				} else if want != errRefused && errors.Is(err, errRefused) {
					t.Errorf("%s: %v, which is no refusal", name, err)
				}
			})
			sends := 1
			if tt.then == lost && name != "Create" {
				sends = 2
			}
			first := map[string]string{"Get": "HGETALL", "Delete": "DEL", "Create": "HSET"}[name]
			if n := f.seen(first, sessionKey(id)); first != "" && n != sends {
				t.Errorf("sent %d times, want %d", n, sends)
			}
			f.locked(func() { struck = false })
			if err := call(store, id); err != nil {
				t.Errorf("%s afterwards: %v", name, err)
			}
			wantOwn(t, store)
			dials := sends
			if tt.then != fine {
				dials++
			}
			m := store.metrics()
			if m["redis_dials_total"] != int64(dials) || tt.then == fine && m["redis_retries_total"] > 0 {
				t.Errorf("%v, want %d dials, and retries only on another connection", m, dials)
			}
		})
	}
}

// A proxy that loses step hands each lookup another's reply, such as an error of a key that holds no hash.
func TestNothingUnprovedEndsASession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		strange := newUUID()
		lost := false
		s, _ := fakeSessions(t, func(command []string) string {
			switch {
			case command[0] == "HGETALL" && command[1] == sessionKey(strange):
				lost = true
				return "-WRONGTYPE of value\r\n-WRONGTYPE of value\r\n"
			case command[0] == "ECHO" && lost:
				lost = false
				return ""
			}
			return plainReply(command)
		})
		together(300, func(i int) {
			id := newUUID()
			if i%30 == 0 {
				id = strange
			}
			if _, err := s.Get(t.Context(), id); errors.Is(err, errNoSession) {
				t.Errorf("Get: %v from a reply that was not proved", err)
			}
		})
	})
}

func TestNobodyWaitsForAnothersReply(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		held := ""
		lookups := 0
		store, _ := fakeSessions(t, func(command []string) string { // answers when both lookups have come
			if command[0] == "HGETALL" {
				lookups++
			}
			held += plainReply(command)
			if lookups < 2 {
				return ""
			}
			replies := held
			held = ""
			return replies
		})
		var first sync.WaitGroup
		first.Go(func() { wantOwn(t, store) })
		synctest.Wait()
		wantOwn(t, store)
		first.Wait()
	})
}

func TestAReplyThatNobodyAskedForEndsTheConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		extra := ":1\r\n"
		store, f := fakeSessions(t, func(command []string) string {
			reply := plainReply(command)
			if command[0] == "ECHO" {
				reply += extra // behind the proof of a flush, when nothing is in flight
				extra = ""
			}
			return reply
		})
		wantOwn(t, store)
		synctest.Wait()
		if _, open := f.connections(); open > 0 {
			t.Error("the connection has not ended")
		}
		wantOwn(t, store)
		if dialed, _ := f.connections(); dialed != 2 {
			t.Errorf("%d connections, want 2", dialed)
		}
	})
}

// stepFaults are faults that leave replies in another place than they belong. One piece in every is struck: a
// reply, or all replies to a flush. earlier is the last piece of the same length: the number of replies would
// betray another.
var stepFaults = []struct {
	name    string
	every   int
	flushes bool
	strike  func(piece, earlier []byte) ([]byte, error)
}{
	{"cut", 200, false, func(piece, _ []byte) ([]byte, error) { return piece[:rand.N(len(piece))], io.EOF }},
	{"dropped", 1000, false, func(_, _ []byte) ([]byte, error) { return nil, nil }},
	{"inserted", 50, false, func(piece, earlier []byte) ([]byte, error) {
		return slices.Concat(earlier, piece), nil
	}},
	{"an earlier flush again", 10, true, func(_, earlier []byte) ([]byte, error) { return earlier, nil }},
	{"proof before the replies", 20, true, func(piece, _ []byte) ([]byte, error) {
		proof := bytes.LastIndexByte(piece, '$')
		return slices.Concat(piece[proof:], piece[:proof]), nil
	}},
}

func TestNoAnswerCarriesAnothersSession(t *testing.T) { // not in parallel: it keeps the machine busy
	for _, tt := range stepFaults {
		t.Run(tt.name, func(t *testing.T) {
			r := ownRedis(t)
			p := startProxy(t, r.addr(), 0)
			s := start(t, "REDIS_URL="+p.url())
			s.expectErrors()
			m := newMixture(s, r.url())
			var struck atomic.Int64
			var mu sync.Mutex // a fault is one for all connections
			var piece []byte
			earlier := map[int][]byte{}
			p.set(func(reply []byte) ([]byte, error) {
				mu.Lock()
				defer mu.Unlock()
				piece = append(piece, reply...)
				if tt.flushes && reply[0] != '$' { // ECHO's is the last
					return nil, nil
				}
				whole := piece
				piece = nil
				before := earlier[len(whole)]
				earlier[len(whole)] = whole
				if before == nil || rand.N(tt.every) > 0 {
					return whole, nil
				}
				struck.Add(1)
				return tt.strike(whole, before)
			})
			right := int64(rounds(1_000, 50_000))
			m.lookUpAndSignIn(func() bool { return m.right.Load() >= right && struck.Load() >= 3 }, func() {})
			atOnce := m.right.Load()
			m.lookUp(func() bool { return m.right.Load() >= atOnce+right/20 }) // one a flush
			p.set(nil)
			s.wantBack(200, "GET /user", cookie(m.ids[0]))
			wantEnds(t, r.url())
		})
	}
}

// mixture looks sessions up whose users it knows, over a line that is bad.
type mixture struct {
	*service
	direct *redisSessions // past what makes the line bad
	ids    []string
	users  []User
	right  atomic.Int64 // answers
}

func newMixture(s *service, redisURL string) *mixture {
	s.Helper()
	m := &mixture{service: s, direct: openRedisSessions(s, redisURL)}
	for i := range 200 {
		user := testUser(i)
		m.ids = append(m.ids, checkedStore{s, m.direct}.create(user, time.Hour))
		m.users = append(m.users, user)
	}
	return m
}

// lookUpAndSignIn looks sessions up at once, so that many are in a flush, and signs in and out beside that,
// with a disturbance each time.
func (m *mixture) lookUpAndSignIn(enough func() bool, disturb func()) {
	m.Helper()
	var others sync.WaitGroup
	for range 64 {
		others.Go(func() { m.lookUp(enough) })
	}
	m.signInAndOut(disturb)
	others.Wait()
}

// lookUp looks sessions up until that is enough, which it must be within two minutes. Some of its clients
// hang up.
func (m *mixture) lookUp(enough func() bool) {
	deadline := time.Now().Add(2 * time.Minute)
	for !enough() {
		if time.Now().After(deadline) {
			m.Errorf("%d right answers within 2 minutes, want more", m.right.Load())
			return
		}
		i := rand.N(len(m.ids))
		req, err := http.NewRequest("GET", m.url+"/user", nil)
		if err != nil {
			m.Error(err)
			return
		}
		ctx, cancel := context.WithCancel(m.Context())
		if rand.N(20) == 0 {
			time.AfterFunc(time.Duration(rand.N(1000))*time.Microsecond, cancel)
		}
		req.Header.Set("Cookie", cookieName+"="+m.ids[i])
		if resp, err := m.client.Do(req.WithContext(ctx)); err == nil {
			body, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			switch {
			case err != nil: // hung up
			case resp.StatusCode == 200 && string(body) == userJSON(m.users[i]):
				m.right.Add(1)
			case resp.StatusCode == 503:
			default:
				m.Errorf("status %d: %s, want %s", resp.StatusCode, body, userJSON(m.users[i]))
			}
		}
		cancel()
	}
}

// exists tells whether a session is in Redis.
func (m *mixture) exists(id string) bool {
	m.Helper()
	_, err := m.direct.Get(m.Context(), id)
	for errors.Is(err, errUnavailable) { // in a cluster this line is bad too
		_, err = m.direct.Get(m.Context(), id)
	}
	return err == nil
}

// signInAndOut checks each answer against what Redis really holds.
func (m *mixture) signInAndOut(disturb func()) {
	m.Helper()
	email := newEmail()
	m.addAccount(email, bcrypt.MinCost)
	old := newUUID()
	for i := range rounds(20, 300) {
		disturb()
		a := m.ask("POST /user/signin", credentials(email, password), cookie(old))
		if a.status == 503 {
			continue
		}
		if a.status != 200 || a.cookie == nil {
			m.Fatalf("POST /user/signin: status %d: %s", a.status, a.body)
		}
		id := a.cookie.Value
		if !m.exists(id) || m.exists(old) {
			m.Errorf("signed in: the new session exists: %v, the old one: %v", m.exists(id), m.exists(old))
		}
		old = id
		if i%2 == 0 {
			continue
		}
		status := m.status("DELETE /user/session", "", cookie(id))
		if status == 503 {
			continue
		}
		if status != 204 || m.exists(id) {
			m.Errorf("DELETE /user/session: status %d; the session exists: %v", status, m.exists(id))
		}
		if status := m.status("GET /user", "", cookie(id)); status != 401 && status != 503 {
			m.Errorf("GET /user after its end: status %d, want 401", status)
		}
	}
}

// ---------------------------------------------------------------------------------------------------
// Redis: connecting, and connections that end.

func TestConnectingHasTimeOfItsOwn(t *testing.T) {
	hang := func(ctx context.Context, _ int) error {
		<-ctx.Done()
		return ctx.Err()
	}
	after := func(d time.Duration) func(ctx context.Context, attempt int) error {
		return func(ctx context.Context, _ int) error {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(d):
				return nil
			}
		}
	}
	refused := errors.New("refused")
	for _, tt := range []struct {
		name    string
		dial    func(ctx context.Context, attempt int) error
		back    time.Duration // after which requests are answered; -1 for never
		dials   int64         // in 15 s
		message error
	}{
		{name: "at once", dial: after(0), dials: 1},
		{name: "longer than a request can wait", dial: after(5500 * time.Millisecond),
			back: 5500 * time.Millisecond, dials: 6, message: errTimeout},
		{name: "a first attempt that hangs", dial: func(ctx context.Context, attempt int) error {
			if attempt == 0 {
				return hang(ctx, attempt)
			}
			return nil
		}, back: time.Second, dials: 2, message: errTimeout},
		{name: "never", dial: hang, back: -1, dials: 17, message: errUnavailable},
		{name: "refused", dial: func(context.Context, int) error { return refused },
			back: -1, dials: 155, message: errUnavailable}, // one each 0.1 s
	} {
		inVirtualTime(t, tt.name, func(t *testing.T) {
			var attempts atomic.Int64
			s := virtualSessions(t, "redis://h", func(ctx context.Context, _ string) (*fakeRedis, error) {
				return &fakeRedis{answer: plainReply}, tt.dial(ctx, int(attempts.Add(1)-1))
			})
			began := time.Now()
			var requests sync.WaitGroup
			for range 1500 { // one each 10 ms
				requests.Go(func() {
					asked := time.Since(began)
					err := s.Ping(t.Context())
					took := time.Since(began) - asked
					early := tt.back < 0 || asked+operationTimeout < tt.back
					late := !early && asked >= tt.back
					wrong := err == nil || tt.message != nil && !errors.Is(err, tt.message)
					if late && err != nil || early && wrong {
						t.Errorf("after %v: %v", asked, err)
					}
					if took > operationTimeout {
						t.Errorf("after %v: told after %v", asked, took)
					}
				})
				time.Sleep(10 * time.Millisecond)
			}
			requests.Wait()
			time.Sleep(15*time.Second - time.Since(began))
			if n := s.metrics()["redis_dials_total"]; n < tt.dials*2/3 || n > tt.dials+1 {
				t.Errorf("%d attempts, want %d", n, tt.dials)
			}
			if err := s.Ping(t.Context()); tt.back >= 0 && err != nil {
				t.Errorf("at last: %v", err)
			}
		})
	}
}

// What is far, or has a slow name server, takes a while to connect. A request waits for that as long as it
// can, and later ones find the connection.
func TestWhatConnectsSlowlyIsReached(t *testing.T) {
	const takes = 1200 * time.Millisecond
	for url, nodes := range map[string]fakeNodes{
		"redis://h":     {"h:6379": {answer: plainReply}},
		"redis://entry": {"entry:6379": {answer: movedTo("node:1")}, "node:1": {answer: plainReply}},
		"redis-sentinel://s1,s2/primary": {"s2:26379": &newVirtualSentinel("p").fakeRedis,
			"p:1": {answer: plainReply}},
	} {
		inVirtualTime(t, url, func(t *testing.T) {
			s := virtualSessions(t, url, slowly(takes, nodes.find))
			for s.Ping(t.Context()) != nil {
			}
			s.Get(t.Context(), newUUID()) // may have to find a node
			time.Sleep(takes)
			wantOwn(t, s)
		})
	}
}

func TestWhatCannotBeConnectedIsNamed(t *testing.T) {
	wantNamed := func(t *testing.T, s *redisSessions, addr, cause string) {
		err := s.Ping(t.Context())
		text := fmt.Sprint(err)
		named := strings.Contains(text, addr) && strings.Contains(text, cause)
		if !errors.Is(err, errUnavailable) || !named {
			t.Errorf("%v, want %s and %q", err, addr, cause)
		}
	}
	for addr, cause := range map[string]string{
		"127.0.0.1:" + freePort():   "connection refused",
		"no-such-host.invalid:6379": "no such host",
	} {
		wantNamed(t, openRedisSessions(t, "redis://"+addr), addr, cause)
	}
	for login, tt := range map[string]struct{ cause, reply string }{
		"":           {cause: "no connection stands yet"}, // to the ECHO
		":password@": {cause: "no connection stands yet"},
		":hangs-up@": {cause: "AUTH: EOF", reply: cutOff},
		":wrong@":    {cause: "WRONGPASS no", reply: "-WRONGPASS no\r\n"},
		":speaks-http@": {cause: "AUTH: redigo: unexpected response line",
			reply: "HTTP/1.1 400 Bad Request\r\n\r\n"},
	} {
		inVirtualTime(t, login+tt.cause, func(t *testing.T) {
			f := &fakeRedis{answer: func([]string) string { return tt.reply }, mute: true}
			s := virtualSessions(t, "redis://"+login+"h", fakeNodes{"h:6379": f}.find)
			wantNamed(t, s, "h:6379", tt.cause)
		})
	}
}

func TestASilentServerIsPassedOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		silent, second := &fakeRedis{answer: plainReply, mute: true}, &fakeRedis{answer: plainReply}
		s := virtualSessions(t, "redis://silent,second",
			fakeNodes{"silent:6379": silent, "second:6379": second}.find)
		began := time.Now()
		for s.Ping(t.Context()) != nil {
			if took := time.Since(began); took > 3*time.Second {
				t.Fatalf("no answer after %v, want one within 3 s", took)
			}
		}
	})
}

// Some hosts of REDIS_URL drop packets. The last one was away, and returns at any time.
func TestReturnBesideHostsThatAreLost(t *testing.T) {
	for after := 5 * time.Second; after < 7*time.Second; after += 100 * time.Millisecond {
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			find := func(ctx context.Context, addr string) (*fakeRedis, error) {
				if addr == "e:6379" && time.Since(began) >= after {
					return &fakeRedis{answer: plainReply}, nil
				}
				<-ctx.Done()
				return nil, ctx.Err()
			}
			s := virtualSessions(t, "redis://a,b,c,d,e", find)
			for time.Since(began) < after {
				go s.Get(context.Background(), newUUID())
				time.Sleep(50 * time.Millisecond)
			}
			back := time.Now()
			for s.Ping(t.Context()) != nil {
			}
			if took := time.Since(back); took > 2*time.Second {
				t.Errorf("back after %v, want 2 s at most", took)
			}
		})
	}
}

// Connecting takes more than half of the time that an operation has.
func TestAConnectionThatEndedCostsNoLookup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cut := false
		f := &fakeRedis{answer: func(command []string) string {
			if cut {
				cut = false
				return cutOff
			}
			return plainReply(command)
		}}
		s := virtualSessions(t, "redis://h", slowly(1300*time.Millisecond, fakeNodes{"h:6379": f}.find))
		wantOwn(t, s)
		for name, call := range storeCalls {
			cut = name != "Create" // which is never sent twice
			if err := call(s, newUUID()); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}

func TestConnectionsThatDiedIdleCostNothing(t *testing.T) {
	t.Parallel()
	r := ownRedis(t)
	p := startProxy(t, r.addr(), 0)
	s := start(t, "REDIS_URL="+p.url(), "LOG_LEVEL=debug")
	s.log.find(t, "session store takes sessions") // of the trial session
	s.expectErrors()
	user, id := s.register(newEmail())
	for range rounds(5, 50) {
		p.cut()
		s.want(200, id)
		p.cut()
		s.wantStatus(200, "GET /healthz", "")
		p.cut()
		signIn := func() int { return s.status("POST /user/signin", credentials(user.Email, password)) }
		status := signIn()
		if status == 503 { // in the very moment of the cut: it is never sent twice
			status = signIn()
		}
		if status != 200 {
			t.Errorf("POST /user/signin: status %d, want 200", status)
		}
		p.cut()
		s.wantSignOut(id)
		id = s.signIn(user.Email)
	}
	s.register(newEmail())
}

func TestNothingThatTimedOutIsSentAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, f := fakeSessions(t, func([]string) string { return "" })
		together(3, func(i int) {
			time.Sleep(proofTimeout * time.Duration(i) / 4) // some have time left when the first has none
			if err := storeCalls["Get"](store, newUUID()); !errors.Is(err, errUnavailable) {
				t.Errorf("Get: %v, want errUnavailable", err)
			}
		})
		if n := f.seen("HGETALL"); n != 3 {
			t.Errorf("3 lookups were sent as %d", n)
		}
	})
}

func TestARedisThatReadsNothingHoldsNobodyUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, _ := fakeSessions(t, func([]string) string { return readNoMore })
		large := testUser(1)
		large.Name = strings.Repeat("x", 1<<20) // more than the fake has read
		together(2, func(int) {
			began := time.Now()
			err := store.Create(t.Context(), newUUID(), large, time.Hour)
			if took := time.Since(began); !errors.Is(err, errUnavailable) || took > 3*time.Second {
				t.Errorf("Create: %v after %v, want errUnavailable within 3 s", err, took)
			}
		})
	})
}

// A Redis that answers 1,400 lookups a second is asked by 3,000 clients.
func TestAnOverloadedRedisIsNotGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rate, seconds = 1400, 10
		s, f := fakeSessions(t, plainReply)
		f.delays = map[string]time.Duration{"HGETALL": time.Second / rate}
		end := time.Now().Add(seconds * time.Second)
		var answered atomic.Int64
		together(3000, func(int) {
			for time.Now().Before(end) {
				_, err := s.Get(t.Context(), newUUID())
				if err == nil {
					answered.Add(1)
				} else if !errors.Is(err, errTimeout) {
					t.Errorf("Get: %v", err)
				}
			}
		})
		if n := answered.Load(); n < rate*seconds*8/10 {
			t.Errorf("%d lookups were answered, want %d", n, rate*seconds)
		}
		if n := s.metrics()["redis_dials_total"]; n != 1 {
			t.Errorf("%d connections, want 1", n)
		}
	})
}

func TestASignInIsAnsweredInTimeWhenTheOldSessionCannotBeEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeRedis{answer: func(command []string) string {
			switch command[0] {
			case "HGETALL":
				return cutOff
			case "DEL":
				return ""
			}
			return plainReply(command)
		}}
		sessions := virtualSessions(t, "redis://:password@h", fakeNodes{"h:6379": f}.find)
		s := newUnit(t, unitConfig{sessions: sessions})
		s.expectErrors()
		s.addAccount(adaEmail, bcrypt.MinCost)
		lookup := s.request(s.Context(), oneAddr, "GET /user", "", "", cookie(newUUID()))
		if lookup.status != 503 { // and the connection has ended
			s.Errorf("GET /user: status %d, want 503", lookup.status)
		}
		const slowly = proofTimeout * 4 / 5
		f.locked(func() { f.delays = map[string]time.Duration{"AUTH": slowly, "EXEC": slowly} })
		began := time.Now()
		a := s.request(s.Context(), oneAddr, signInRoute, adaEmail, password, cookie(newUUID()))
		if took := time.Since(began); a.status != 503 || took > 3*time.Second {
			s.Errorf("%s: status %d after %v, want 503 within 3 s", signInRoute, a.status, took)
		}
	})
}

func TestCloseTellsWhatWaits(t *testing.T) {
	for name, mute := range map[string]bool{"for replies": false, "for a connection": true} {
		inVirtualTime(t, name, func(t *testing.T) {
			store, f := fakeSessions(t, func([]string) string { return "" })
			f.mute = mute
			var waiting sync.WaitGroup
			for range 10 {
				waiting.Go(func() {
					_, err := store.Get(t.Context(), newUUID())
					if !errors.Is(err, errUnavailable) || !mute && !errors.Is(err, errClosed) {
						t.Errorf("Get: %v, want errClosed", err)
					}
				})
			}
			synctest.Wait()
			if n := f.seen("HGETALL"); n == 0 != mute {
				t.Errorf("%d lookups are sent", n)
			}
			store.Close()
			waiting.Wait()
			for what, call := range storeCalls {
				err := call(store, newUUID())
				if !errors.Is(err, errClosed) || !errors.Is(err, errUnavailable) {
					t.Errorf("%s after Close: %v, want errClosed", what, err)
				}
			}
			synctest.Wait()
			if dialed, open := f.connections(); dialed != 1 || open > 0 {
				t.Errorf("%d connections of %d are left, want none of 1", open, dialed)
			}
		})
	}
}

// ---------------------------------------------------------------------------------------------------
// Redis: away, or refusing.

// statuses are what requests that need the session store are answered.
type statuses struct{ signIn, lookup, signOut, health int }

var (
	allAway       = statuses{signIn: 503, lookup: 503, signOut: 503, health: 503}
	noWrites      = statuses{signIn: 503, lookup: 200, signOut: 503, health: 200}
	noNewSessions = statuses{signIn: 503, lookup: 200, signOut: 204, health: 200}
	noLookups     = statuses{signIn: 200, lookup: 503, signOut: 204, health: 200}
	onlyEcho      = statuses{signIn: 503, lookup: 503, signOut: 503, health: 200}
)

// redisFault strikes a Redis that sessions are in.
type redisFault struct {
	name    string
	want    statuses
	cause   string // in the log, where Redis refuses
	options []string
	fail    func(testing.TB, *redisServer)
	heal    func(testing.TB, *redisServer)
}

func TestRedisFaults(t *testing.T) {
	t.Parallel()
	do := func(command string, args ...any) func(testing.TB, *redisServer) {
		return func(t testing.TB, r *redisServer) { r.do(t, command, args...) }
	}
	send := func(signal string) func(testing.TB, *redisServer) {
		return func(_ testing.TB, r *redisServer) { r.signal(signal) }
	}
	kill := func(_ testing.TB, r *redisServer) { r.kill() }
	launch := func(t testing.TB, r *redisServer) { r.launch(t) }
	replicate := do("REPLICAOF", "127.0.0.1", freePort())
	promote := do("REPLICAOF", "NO", "ONE")
	cannotSave := func(t testing.TB, r *redisServer) {
		if err := r.host.command("mkdir", r.host.dir+"/"+r.port+".rdb").Run(); err != nil {
			t.Fatal(err)
		}
		r.do(t, "CONFIG", "SET", "save", "3600 1")
		r.do(t, "BGSAVE")
		eventually(t, 20*time.Second, "Redis cannot save", func() bool {
			info, _ := redis.String(r.do(t, "INFO", "persistence"), nil)
			return strings.Contains(info, "rdb_last_bgsave_status:err")
		})
	}
	load := func(t testing.TB, r *redisServer) {
		r.do(t, "EVAL", `for i = 1, 20000 do redis.call('SET', 'filler:' .. i, string.rep('x', 200)) end`, 0)
		r.do(t, "SAVE")
		r.kill()
		r.args = append(r.args, "--key-load-delay", "5000", "--loading-process-events-interval-bytes", "1024")
		r.launch(t)
	}
	faults := []redisFault{
		{name: "killed, and back with its data", want: allAway, fail: kill, heal: launch,
			options: []string{"--appendonly", "yes", "--appendfsync", "always"}},
		{name: "frozen", want: allAway, fail: send("STOP"), heal: send("CONT")},

		{name: "full", want: noNewSessions, cause: "OOM",
			fail: do("CONFIG", "SET", "maxmemory", 1), heal: do("CONFIG", "SET", "maxmemory", 0)},
		{name: "no snapshot can be saved", want: noWrites, cause: "MISCONF",
			fail: cannotSave, heal: do("CONFIG", "SET", "save", "")},
		{name: "a replica", want: noWrites, cause: "READONLY", fail: replicate, heal: promote},
		{name: "loading", want: onlyEcho, cause: "LOADING",
			fail: load, heal: do("CONFIG", "SET", "key-load-delay", 0)},
	}
	for command, want := range map[string]statuses{"expire": noNewSessions, "del": noWrites, "echo": allAway,
		"hgetall": noLookups} {
		faults = append(faults, redisFault{name: "no right to " + command, want: want, cause: "NOPERM",
			fail: do("ACL", "SETUSER", "default", "-"+command),
			heal: do("ACL", "SETUSER", "default", "+"+command)})
	}
	for _, tt := range faults {
		t.Run(tt.name, tt.test)
	}
}

func (f redisFault) test(t *testing.T) {
	t.Parallel()
	r := ownRedis(t, f.options...)
	s := start(t, "REDIS_URL="+r.url())
	s.expectErrors()
	email := newEmail()
	s.addAccount(email, bcrypt.MinCost)
	// Each of these is for one kind of request: what is not answered may yet have been done.
	kept, replaced, ended := s.signIn(email), s.signIn(email), s.signIn(email)
	registered := f.want.signIn
	if registered == 200 || f.name == "no right to del" { // the old session lives on
		registered = 201
	}
	f.fail(t, r)
	for _, a := range []struct {
		route, body, id string
		want            int
	}{
		{"GET /user", "", kept, f.want.lookup},
		{"GET /user", "", "", 401},
		{"DELETE /user/session", "", ended, f.want.signOut},
		{"GET /healthz", "", "", f.want.health},
		{"POST /user/signin", credentials(email, password), replaced, f.want.signIn},
		{"POST /user", credentials(newEmail(), password), newUUID(), registered},
	} {
		elapsed := startWatch()
		got := s.ask(a.route, a.body, cookie(a.id)) // no 503 sets a cookie: see checkReply
		if took := elapsed(); got.status != a.want || took > 3*time.Second {
			t.Errorf("%s: status %d after %v, want %d within 3 s: %s",
				a.route, got.status, took, a.want, got.body)
		}
	}
	if n := query[int](s, `SELECT count(*) FROM users`); registered == 503 && n != 1 {
		t.Errorf("a registration that was refused left %d accounts behind", n-1)
	}
	if f.want.lookup == 503 {
		s.wantOutageInTime(kept)
	}
	f.heal(t, r)
	s.wantBack(200, "GET /user", cookie(kept))
	if f.want.signIn == 503 { // the old session lives on
		s.want(200, replaced)
	} else {
		s.want(401, replaced)
	}
	if f.want.signOut == 204 {
		s.want(401, ended)
	} else if f.want.health == 200 {
		s.want(200, ended)
	}
	s.want(200, s.signIn(email))
	s.register(newEmail())
	f.wantCause(s)
	wantEnds(t, r.url())
}

func (f redisFault) wantCause(s *service) {
	s.Helper()
	message := "store out of reach"
	if f.cause != "" && f.want != allAway {
		message = "store refuses"
	}
	s.wantCause(message, f.cause)
}

// wantOutageInTime has many look a session up at once, none of whom may wait for long.
func (s *service) wantOutageInTime(id string) {
	s.Helper()
	var late atomic.Int64
	together(300, func(int) {
		elapsed := startWatch()
		s.want(503, id)
		if elapsed() > 3*time.Second {
			late.Add(1)
		}
	})
	if late.Load() > 0 {
		s.Errorf("of 300 lookups at once %d were answered after 3 s", late.Load())
	}
}

// wantEnds checks that no session stays for ever.
func wantEnds(t testing.TB, url string) {
	t.Helper()
	eventually(t, 5*time.Second, "every session has an end", func() bool {
		keys, err := redis.Strings(redisDo(t, url, "KEYS", "session:*"), nil)
		return err == nil && !slices.ContainsFunc(keys, func(key string) bool {
			return redisDo(t, url, "TTL", key) == any(int64(-1))
		})
	})
}

func TestStartWithoutAWillingRedis(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name           string
		options        []string
		login          string
		message, cause string
		signIn         int
	}{
		{name: "no HGETALL", options: []string{"--rename-command", "HGETALL", ""},
			message: "store refuses", cause: "unknown command", signIn: 200},
		{name: "a wrong password", options: []string{"--requirepass", "right"}, login: ":wr0ng@",
			message: "store out of reach", cause: "WRONGPASS", signIn: 503},
		{name: "away", message: "store out of reach", signIn: 503}, // a container's port may take connections
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := ownRedis(t, tt.options...)
			if tt.name == "away" {
				r.kill()
			}
			s := start(t, "REDIS_URL=redis://"+tt.login+r.addr())
			s.expectErrors()
			s.secret("wr0ng", sessionKey("")) // Redis quotes what it does not know
			s.wantCause(tt.message, tt.cause)
			email := newEmail()
			s.addAccount(email, bcrypt.MinCost)
			body := credentials(email, password)
			s.wantStatus(tt.signIn, "POST /user/signin", body, cookie(newUUID()))
			s.want(503, newUUID())
			if tt.name != "away" {
				return
			}
			r.launch(t)
			s.wantBack(200, "GET /healthz")
			s.want(200, s.signIn(email))
			eventually(t, 10*time.Second, "the store is said to be back", func() bool {
				s.status("GET /healthz", "")
				return len(s.log.lines("store is back")) == 1
			})
		})
	}
}

func TestASilentRedisDelaysNeitherTheStartNorTheEnd(t *testing.T) {
	t.Parallel()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	s := start(t, "REDIS_URL=redis://"+silent.Addr().String())
	s.expectErrors()
	s.wantStatus(404, "GET /nowhere", "")
	s.stop()
	log := s.log.String()
	listening, trouble := strings.Index(log, `"listening"`), strings.Index(log, `"store out of reach`)
	if trouble < listening {
		t.Errorf("want a line that it listens, and then one of the trial that failed:\n%s", log)
	}
}

func TestAServerThatIsNoneToAskIsLeft(t *testing.T) {
	for _, word := range []string{"READONLY", "MASTERDOWN", "CLUSTERDOWN"} {
		inVirtualTime(t, word, func(t *testing.T) { testLeaving(t, word) })
	}
}

func testLeaving(t *testing.T, word string) {
	first := &fakeRedis{answer: func(command []string) string {
		if command[0] == "DEL" {
			return "-" + word + "\r\n"
		}
		return plainReply(command)
	}}
	second := &fakeRedis{answer: plainReply}
	s := virtualSessions(t, "redis://first,second",
		fakeNodes{"first:6379": first, "second:6379": second}.find)
	for range 10 {
		if err := s.Delete(t.Context(), newUUID()); !isRefusal(err, word) {
			t.Errorf("DEL: %v, want %s", err, word)
		}
		wantOwn(t, s) // reads go on
	}
	time.Sleep(minStay)
	if err := s.Delete(t.Context(), newUUID()); err != nil || second.seen("DEL") != 1 {
		t.Errorf("DEL at the second host: %v", err)
	}
	wantOwn(t, s)
	if n := s.metrics()["redis_dials_total"]; n != 2 || second.seen("HGETALL") != 1 {
		t.Errorf("%d connections, want 2, and lookups go where changes go", n)
	}
}

// ---------------------------------------------------------------------------------------------------
// Redis: Sentinel.

// virtualSentinel names a primary, which a failover changes.
type virtualSentinel struct {
	fakeRedis
	primary string // host, of port 1
}

func newVirtualSentinel(primary string) *virtualSentinel {
	v := &virtualSentinel{primary: primary}
	v.answer = func([]string) string { return "*2\r\n" + bulkString(v.primary) + bulkString("1") }
	return v
}

func (v *virtualSentinel) fail(over string) {
	v.locked(func() { v.primary = over })
}

// The connection to the old primary may live on behind a partition, and a sentinel there, too. What is
// written there is undone later.
func TestAPrimaryThatSentinelsHaveReplacedIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stale, s2, s3 := newVirtualSentinel("old"), newVirtualSentinel("old"), newVirtualSentinel("old")
		old, replica := &fakeRedis{answer: plainReply}, &fakeRedis{answer: plainReply}
		s := virtualSessions(t, "redis-sentinel://stale,s2,s3/primary", fakeNodes{
			"stale:26379": &stale.fakeRedis, "s2:26379": &s2.fakeRedis, "s3:26379": &s3.fakeRedis,
			"old:1": old, "new:1": replica}.find)
		wantOwn(t, s)
		time.Sleep(time.Minute)
		wantOwn(t, s)
		if n := s.metrics()["redis_dials_total"]; n != 1 {
			t.Errorf("%d connections to a primary that stays, want 1", n)
		}
		s2.fail("new")
		s3.fail("new")
		for i := range 2 { // and not back again, not even where the old one's sentinel alone answers
			if i == 1 {
				for _, v := range []*virtualSentinel{s2, s3} {
					v.locked(func() { v.answer = func([]string) string { return "" } })
				}
			}
			time.Sleep(10 * time.Second)
			for _, call := range storeCalls {
				if err := call(s, newUUID()); err != nil {
					t.Error(err)
				}
			}
		}
		if old.seen("HGETALL") != 2 || old.seen("DEL") > 0 || replica.seen("HSET") != 2 {
			t.Errorf("the old primary was sent %s, the new one %s", old.commands(), replica.commands())
		}
	})
}

func TestASentinelThatKnowsLessIsPassedOver(t *testing.T) {
	const slave, refuses = "*1\r\n$5\r\nslave\r\n", "-NOPERM\r\n"
	for _, tt := range []struct {
		name string
		says string // the sentinel; "": the address of a primary
		role string // says that primary; "": it hangs up
	}{
		{name: "has not heard of the failover", role: slave},
		{name: "names one that does not tell its role", role: refuses},
		{name: "names one that hangs up"},
		{name: "knows none of the name", says: "*-1\r\n"},
		{name: "refuses", says: "-NOAUTH\r\n"},
		{name: "answers in another shape", says: "*1\r\n$1\r\nx\r\n"},
		{name: "says nothing", says: "nothing"},
	} {
		for url, want := range map[string]error{"behind": errUnavailable, "behind,right": nil} {
			inVirtualTime(t, tt.name+": "+url, func(t *testing.T) {
				says := func(reply string) *fakeRedis {
					return &fakeRedis{answer: func([]string) string { return reply }}
				}
				names := func(primary string) string {
					return "*2\r\n" + bulkString(primary) + bulkString("1")
				}
				nodes := fakeNodes{
					"behind:26379": says(strings.TrimPrefix(cmp.Or(tt.says, names("old")), "nothing")),
					"right:26379":  says(names("new")),
					"old:1":        says(cmp.Or(tt.role, cutOff)),
					"new:1":        {answer: plainReply},
				}
				s := virtualSessions(t, "redis-sentinel://"+url+"/accounts", nodes.find)
				began := time.Now()
				err := s.Ping(t.Context())
				if took := time.Since(began); !errors.Is(err, want) || took > 3*time.Second {
					t.Errorf("%v after %v, want %v within 3 s", err, took, want)
				}
			})
		}
	}
}

func TestSentinelsNameThePrimary(t *testing.T) {
	t.Parallel()
	host := ownRedisHost(t)
	primary := host.start(t)
	replica := host.start(t, "--replicaof", "127.0.0.1 "+primary.port)
	url := "REDIS_URL=redis-sentinel://127.0.0.1:" + freePort() // nobody is there
	var sentinels []*redisServer
	for range 3 {
		sentinel := host.startSentinel(t, "sentinel monitor accounts 127.0.0.1 "+primary.port+" 2",
			"sentinel down-after-milliseconds accounts 500", "sentinel failover-timeout accounts 3000")
		sentinels = append(sentinels, sentinel)
		url += "," + sentinel.addr()
	}
	for _, sentinel := range sentinels {
		eventually(t, 30*time.Second, "the sentinels know each other and the replica", func() bool {
			info, _ := redis.String(sentinel.do(t, "INFO", "sentinel"), nil)
			return strings.Contains(info, "slaves=1,sentinels=3")
		})
	}
	s := start(t, url+"/accounts/0")
	s.expectErrors()
	user, id := s.register(newEmail())
	// Redis may put off a replica's first copy for seconds, and Sentinel elects an empty replica too.
	eventually(t, 30*time.Second, "the replica has the session", func() bool {
		return replica.do(t, "EXISTS", "session:"+id) == any(int64(1))
	})
	primary.kill()
	answers := map[int]int{}
	eventually(t, time.Minute, "another primary is elected", func() bool {
		answers[s.status("GET /user", "", cookie(id))]++
		reply := sentinels[0].do(t, "SENTINEL", "get-master-addr-by-name", "accounts")
		addr, _ := redis.Strings(reply, nil)
		return len(addr) == 2 && addr[1] == replica.port
	})
	s.wantBack(200, "GET /user", cookie(id))
	if delete(answers, 200); len(answers) != 1 || answers[503] == 0 {
		t.Errorf("answers by status: %v, want 503 only until it is elected", answers)
	}
	s.want(200, s.signIn(user.Email))
	for _, sentinel := range sentinels {
		sentinel.kill()
	}
	s.want(200, s.signIn(user.Email))
	s.want(200, id)
}

// ---------------------------------------------------------------------------------------------------
// Redis: a cluster.

// fakeCluster are sessions in a cluster of fakes. Each answers a command with the replies of its script, one
// by one, and then with plainReply. In a reply #1 stands for the address of the second node, PORT1 for its
// port, SLOT for the key's slot.
func fakeCluster(t testing.TB, key string, scripts ...map[string][]string) (*redisSessions, []*fakeRedis) {
	t.Helper()
	names := strings.NewReplacer("SLOT", strconv.Itoa(slotOf(key)), "#", "h:700", "PORT", "700")
	var nodes []*fakeRedis
	byAddr := fakeNodes{}
	for i := range scripts {
		left := maps.Clone(scripts[i])
		node := &fakeRedis{answer: func(command []string) string {
			replies := left[command[0]]
			if len(replies) == 0 {
				return plainReply(command)
			}
			left[command[0]] = replies[1:]
			return names.Replace(replies[0]) + "\r\n"
		}}
		nodes = append(nodes, node)
		byAddr["h:700"+strconv.Itoa(i)] = node
	}
	return virtualSessions(t, "redis://h:7000", byAddr.find), nodes
}

// movedTo redirects what has a key.
func movedTo(addr string) func(command []string) string {
	return func(command []string) string {
		if len(command) > 1 && strings.HasPrefix(command[1], "session:") {
			return fmt.Sprintf("-MOVED %d %s\r\n", slotOf(command[1]), addr)
		}
		return plainReply(command)
	}
}

func TestRedirections(t *testing.T) {
	t.Parallel()
	type script = map[string][]string
	const moved, ask, aborted = "-MOVED SLOT #1", "-ASK SLOT #1", "-EXECABORT"
	get := func(replies ...string) script { return script{"HGETALL": replies} }
	commands := strings.NewReplacer("L", "HGETALL ECHO ", "D", "DEL ECHO ", "A", "ASKING ",
		"C", "MULTI HSET EXPIRE EXEC ECHO ")
	for _, tt := range []struct {
		name    string
		call    string   // Get if it is not named
		nodes   []script // the first one is in REDIS_URL
		want    error    // of the first call; the same call again has none
		sent    string   // to each node, in both calls: see commands
		dialled int      // connections to the first node, if not 1
	}{
		{name: "none", nodes: []script{nil}, sent: "LL"},
		{name: "MOVED is remembered", nodes: []script{get(moved), nil}, sent: "L|LL"},
		{name: "ASK is not", nodes: []script{get(ask, ask), nil}, sent: "LL|ALAL"},
		{name: "an unknown host", nodes: []script{get("-MOVED SLOT ?:PORT1"), nil}, sent: "L|LL"},
		{name: "five", nodes: []script{get(moved), get("-MOVED SLOT #2"), get("-ASK SLOT #3"),
			get("-ASK SLOT #4"), get("-MOVED SLOT #5"), nil}, sent: "L|L|L|AL|AL|LL"},
		{name: "six", nodes: []script{get(moved, moved, moved),
			get(slices.Repeat([]string{"-MOVED SLOT #0"}, 3)...)},
			want: errUnavailable, sent: "LLLL|LLL", dialled: 2},
		{name: "to itself", nodes: []script{get("-MOVED SLOT #0", "-MOVED SLOT #0")},
			sent: "LLLL", dialled: 2},
		{name: "a deletion", call: "Delete", nodes: []script{{"DEL": {moved}}, nil}, sent: "D|DD"},
		{name: "a creation at HSET", call: "Create",
			nodes: []script{{"HSET": {moved}, "EXPIRE": {moved}, "EXEC": {aborted}}, nil}, sent: "C|CC"},
		{name: "a creation at EXEC", call: "Create", nodes: []script{{"EXEC": {moved}}, nil}, sent: "C|CC"},
		{name: "a creation while its slot moves", call: "Create",
			nodes: []script{{"HSET": {ask}, "EXPIRE": {ask}, "EXEC": {aborted}}, nil}, sent: "CC|AC"},

		{name: "no right to ASKING", nodes: []script{get(ask), {"ASKING": {"-NOPERM"}}},
			want: errRefused, sent: "LL|AL"},
		{name: "no slot", nodes: []script{get("-MOVED #1"), nil}, want: errRefused, sent: "LL|"},
		{name: "past the last slot", nodes: []script{get("-MOVED 16384 #1"), nil},
			want: errRefused, sent: "LL|"},
		{name: "no port", nodes: []script{get("-ASK SLOT localhost"), nil}, want: errRefused, sent: "LL|"},
		{name: "no slots", call: "Delete", nodes: []script{{"DEL": {"-CLUSTERDOWN"}}},
			want: errRefused, sent: "DD"},
	} {
		inVirtualTime(t, tt.name, func(t *testing.T) {
			id := newUUID()
			store, nodes := fakeCluster(t, sessionKey(id), tt.nodes...)
			call := storeCalls[cmp.Or(tt.call, "Get")]
			if err := call(store, id); !errors.Is(err, tt.want) {
				t.Errorf("%v, want %v", err, tt.want)
			}
			if err := call(store, id); err != nil {
				t.Errorf("again: %v", err)
			}
			var sent []string
			for _, node := range nodes {
				sent = append(sent, node.commands())
			}
			if got := strings.Join(sent, "|"); got != commands.Replace(tt.sent) {
				t.Errorf("the nodes were sent %s, want %s", got, commands.Replace(tt.sent))
			}
			if n, _ := nodes[0].connections(); n != max(tt.dialled, 1) {
				t.Errorf("%d connections to the first node, want %d", n, max(tt.dialled, 1))
			}
		})
	}
	// An IPv6 address has no brackets here.
	_, _, addr := parseRedirection(&refusedError{server: "redis:6379", text: "MOVED 3999 2001:db8::1:6381"})
	if addr != "[2001:db8::1]:6381" {
		t.Errorf("an IPv6 address is read as %s", addr)
	}
}

// A node is known as long as its connection stands.
func TestALostNodeIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		id := newUUID()
		slot := slotOf(sessionKey(id))
		node := "lost:1"
		moving := func(command []string) string {
			if len(command) > 1 && command[1] == sessionKey(id) {
				return fmt.Sprintf("-MOVED %d %s\r\n", slot, node)
			}
			return plainReply(command)
		}
		lost := &fakeRedis{answer: plainReply}
		other := &fakeRedis{plain: true, answer: func(command []string) string { // at the lost node's address
			switch command[0] {
			case "HGETALL":
				return "*0\r\n"
			case "DEL":
				return ":0\r\n"
			}
			return plainReply(command)
		}}
		nodes := fakeNodes{"entry:6379": {answer: moving}, "lost:1": lost, "found:1": {answer: plainReply}}
		s := virtualSessions(t, "redis://entry", nodes.find)
		user, err := s.Get(t.Context(), id)
		if user.ID != sessionKey(id) || err != nil || lost.seen("HGETALL") != 1 {
			t.Fatalf("Get: %v, %v, want the node's answer", user, err)
		}
		lost.locked(func() { lost.answer = func([]string) string { return cutOff } })
		nodes["lost:1"] = other
		if user, err := s.Get(t.Context(), id); !errors.Is(err, errUnavailable) {
			t.Errorf("Get before the failover: %v, %v, want errUnavailable", user, err)
		}
		node = "found:1"
		if user, err := s.Get(t.Context(), id); user.ID != sessionKey(id) || err != nil {
			t.Errorf("Get: %v, %v, want the session", user, err)
		}
		if err := s.Delete(t.Context(), id); err != nil {
			t.Errorf("Delete: %v", err)
		}
		if len(other.received) > 0 {
			t.Errorf("the other Redis was sent %s", other.commands())
		}
	})
}

// Nodes have left a cluster, and drop packets. They are not dialled when the entry is lost.
func TestNodesThatLeftDelayNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		moved := true
		silent := false
		entry := &fakeRedis{answer: func(command []string) string {
			switch {
			case silent:
				return ""
			case moved && command[0] == "HGETALL":
				slot := slotOf(command[1])
				return fmt.Sprintf("-MOVED %d node%d:1\r\n", slot, slot%8)
			}
			return plainReply(command)
		}}
		nodes := fakeNodes{"entry:6379": entry}
		node := &fakeRedis{answer: plainReply}
		for i := range 8 {
			nodes[fmt.Sprintf("node%d:1", i)] = node
		}
		s := virtualSessions(t, "redis://entry", nodes.find)
		for range 200 {
			wantOwn(t, s)
		}
		node.locked(func() { node.answer = func([]string) string { return cutOff } })
		moved = false
		for i := range 8 {
			delete(nodes, fmt.Sprintf("node%d:1", i))
		}
		if err := s.Ping(t.Context()); err != nil { // asks all nodes, too
			t.Errorf("Ping: %v", err)
		}
		wantOwn(t, s)
		silent = true
		if _, err := s.Get(t.Context(), newUUID()); !errors.Is(err, errTimeout) {
			t.Errorf("Get: %v, want errTimeout", err)
		}
		silent = false
		time.Sleep(time.Second)
		wantOwn(t, s)
	})
}

// redisCluster is a real one: three primaries, which share the slots, and perhaps a replica of each.
type redisCluster struct {
	host      *redisHost
	primaries []*redisServer
	replicas  []*redisServer
}

func startCluster(t testing.TB) *redisCluster {
	t.Helper()
	c := &redisCluster{host: ownRedisHost(t)}
	create := []string{"redis-cli", "--cluster-yes", "--cluster-replicas", "1", "--cluster", "create"}
	for i := range 6 {
		bus := c.host.port()
		node := c.host.start(t, append(leastRights("+asking"), "--cluster-enabled", "yes",
			"--cluster-port", bus, "--cluster-config-file", bus+".nodes",
			"--cluster-node-timeout", "3000")...) // a node that a busy machine keeps from running is not lost
		create = append(create, node.addr())
		if i < 3 {
			c.primaries = append(c.primaries, node)
		} else {
			c.replicas = append(c.replicas, node)
		}
	}
	if out, err := c.host.command(create...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, node := range slices.Concat(c.primaries, c.replicas) {
		eventually(t, 30*time.Second, "the cluster serves", func() bool {
			info, _ := redis.String(node.do(t, "CLUSTER", "INFO"), nil)
			link, _ := redis.String(node.do(t, "INFO", "replication"), nil)
			linked := !strings.Contains(link, "master_link_status:down")
			return linked && strings.Contains(info, "cluster_state:ok")
		})
	}
	return c
}

// nodeID returns a node's name within the cluster.
func (r *redisServer) nodeID(t testing.TB) string {
	t.Helper()
	id, err := redis.String(r.do(t, "CLUSTER", "MYID"), nil)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// has tells whether the server answers for a session, and holds it.
func (r *redisServer) has(id string) bool {
	c, err := redis.Dial("tcp", r.addr(),
		redis.DialReadTimeout(time.Second), redis.DialConnectTimeout(time.Second))
	if err != nil {
		return false
	}
	defer c.Close()
	n, err := redis.Int(c.Do("EXISTS", sessionKey(id)))
	return err == nil && n == 1
}

// asked returns how often the cluster was sent ASKING.
func (c *redisCluster) asked(t testing.TB) (n int) {
	t.Helper()
	calls := regexp.MustCompile(`cmdstat_asking:calls=(\d+)`)
	for _, node := range c.primaries {
		stats, _ := redis.String(node.do(t, "INFO", "commandstats"), nil)
		if found := calls.FindStringSubmatch(stats); found != nil {
			calls, _ := strconv.Atoi(found[1])
			n += calls
		}
	}
	return n
}

// TestAClusterIsServedAsItIs has one cluster, which its parts change one after the other.
func TestAClusterIsServedAsItIs(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	t.Run("ways in", c.testWaysIn)
	t.Run("no answer carries another's session", c.testConnectionsKilled)
	t.Run("a slot that is half moved", c.testHalfMoved)
	t.Run("slots that move", c.testResharding)
	t.Run("nodes that are lost", c.testFailover)
}

func (c *redisCluster) testWaysIn(t *testing.T) {
	addr := c.primaries[2].addr()
	for name, url := range map[string]string{
		"a replica": c.replicas[1].url(),
		"the first of several is dead, a user with the least rights": "redis://" + leastLogin +
			"127.0.0.1:" + freePort() + "," + addr,
	} {
		s := start(t, "REDIS_URL="+url)
		s.secret("s3cr")
		s.wantSignOut(s.wantTurns(15)) // some on each node
		if n := len(s.log.lines("Redis is a cluster")); n != 1 {
			t.Errorf("%s: %d lines in the log say that Redis is a cluster, want 1:\n%s", name, n, s.log)
		}
	}
	s := start(t, "REDIS_URL=redis://"+addr+"/3")
	s.expectErrors()
	s.want(503, newUUID())
	s.wantCause("store out of reach", "SELECT is not allowed in cluster mode")
}

// createIn makes a session whose slot is one of a range.
func (s checkedStore) createIn(user User, first, last int) string {
	id := newUUID()
	for slot := slotOf(sessionKey(id)); slot < first || slot > last; slot = slotOf(sessionKey(id)) {
		id = newUUID()
	}
	s.createAs(id, user, time.Hour)
	return id
}

func (c *redisCluster) testHalfMoved(t *testing.T) {
	store := checkedStore{t, openRedisSessions(t, "redis://"+leastLogin+c.primaries[2].addr())}
	user := testUser(1)
	from, to := c.primaries[0], c.primaries[1]
	const slot = 100
	var ids []string
	for range 6 {
		ids = append(ids, store.createIn(user, slot, slot))
	}
	to.do(t, "CLUSTER", "SETSLOT", slot, "IMPORTING", from.nodeID(t))
	from.do(t, "CLUSTER", "SETSLOT", slot, "MIGRATING", to.nodeID(t))
	migrate := func(id string) { from.do(t, "MIGRATE", "127.0.0.1", to.port, sessionKey(id), 0, 5000) }
	for _, id := range ids[:4] {
		migrate(id)
	}
	before := c.asked(t)
	for range 2 {
		ids = append(ids, store.createIn(user, slot, slot))
	}
	for i, id := range ids {
		store.some(id, user)
		if i%2 == 0 {
			store.remove(id)
		}
	}
	if n := c.asked(t) - before; n < 8 {
		t.Errorf("ASKING was sent %d times, want 8 or more", n)
	}
	for _, id := range ids {
		if from.has(id) {
			migrate(id)
		}
	}
	for _, node := range []*redisServer{to, from} {
		node.do(t, "CLUSTER", "SETSLOT", slot, "NODE", to.nodeID(t))
	}
	for i, id := range ids {
		if i%2 == 0 {
			store.none(id)
		} else {
			store.some(id, user)
		}
	}
}

func (c *redisCluster) testResharding(t *testing.T) {
	store := checkedStore{t, openRedisSessions(t, "redis://"+leastLogin+c.primaries[2].addr())}
	user := testUser(1)
	var live, ended []string
	for range 300 {
		live = append(live, store.createIn(user, 0, 80))
	}
	var done atomic.Bool
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			for !done.Load() {
				store.some(live[rand.N(len(live))], user)
			}
		})
	}
	workers.Go(func() {
		for !done.Load() {
			id := store.createIn(user, 0, 80)
			store.some(id, user)
			store.remove(id)
			ended = append(ended, id)
			store.none(ended[rand.N(len(ended))])
		}
	})
	out, err := c.host.command("redis-cli", "--cluster", "reshard", c.primaries[0].addr(), "--cluster-yes",
		"--cluster-from", c.primaries[0].nodeID(t), "--cluster-to", c.primaries[1].nodeID(t),
		"--cluster-slots", "100", "--cluster-pipeline", "1").CombinedOutput() // the lowest ones move
	done.Store(true)
	workers.Wait()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, id := range live {
		store.some(id, user)
	}
	for _, id := range ended {
		store.none(id)
	}
	if len(ended) == 0 {
		t.Error("no session ended while slots moved")
	}
}

func (c *redisCluster) testFailover(t *testing.T) {
	s := start(t, "REDIS_URL="+c.primaries[0].url())
	s.expectErrors()
	email := newEmail()
	s.addAccount(email, bcrypt.MinCost)
	var ids []string
	for range 40 {
		ids = append(ids, s.signIn(email))
	}
	left := slices.Concat(c.primaries, c.replicas)
	for _, tt := range []struct {
		name   string
		victim *redisServer
		signal string
		whole  string // whether the cluster serves only with all its slots
	}{
		{"hung, and the only one in the URL", c.primaries[0], "STOP", "no"},
		{"killed, of a cluster that wants all its slots", c.primaries[2], "KILL", "yes"},
	} {
		for _, node := range left {
			node.do(t, "CONFIG", "SET", "cluster-require-full-coverage", tt.whole)
		}
		mayFail := map[string]bool{}
		for _, id := range ids {
			mayFail[id] = tt.whole == "yes" || tt.victim.has(id)
		}
		tt.victim.do(t, "WAIT", 1, 5000)
		tt.victim.signal(tt.signal)
		left = slices.DeleteFunc(left, func(node *redisServer) bool { return node == tt.victim })
		eventually(t, time.Minute, "a replica takes over", func() bool {
			s.lookUpMeanwhile(ids, mayFail)
			if status := s.status("GET /healthz", ""); status != 200 && tt.signal == "KILL" {
				t.Errorf("%s: GET /healthz: status %d, want 200", tt.name, status)
			}
			return onSome(left, ids)
		})
		eventually(t, 3*time.Second, "the service is back after Redis", func() bool {
			return s.lookUpMeanwhile(ids, mayFail)
		})
		for range 10 {
			id := s.signIn(email)
			s.want(200, id)
			ids = append(ids, id)
		}
	}
}

// lookUpMeanwhile looks all sessions up at once, and returns whether none is out of reach.
func (s *service) lookUpMeanwhile(ids []string, mayFail map[string]bool) bool {
	s.Helper()
	var away atomic.Int64
	together(len(ids), func(i int) {
		elapsed := startWatch()
		status := s.status("GET /user", "", cookie(ids[i]))
		if status == 503 && mayFail[ids[i]] {
			away.Add(1)
		} else if status != 200 {
			s.Errorf("GET /user: status %d, may be 503: %v", status, mayFail[ids[i]])
		}
		if took := elapsed(); took > 3*time.Second {
			s.Errorf("GET /user: status %d after %v, want it within 3 s", status, took)
		}
	})
	return away.Load() == 0
}

// onSome tells whether each session is held by one of the servers, which answers for it.
func onSome(servers []*redisServer, ids []string) bool {
	return !slices.ContainsFunc(ids, func(id string) bool {
		return !slices.ContainsFunc(servers, func(server *redisServer) bool { return server.has(id) })
	})
}

func (c *redisCluster) testConnectionsKilled(t *testing.T) {
	s := start(t, "REDIS_URL="+c.primaries[0].url())
	s.expectErrors()
	m := newMixture(s, c.primaries[0].url())
	kills := 0
	right := int64(rounds(1_000, 50_000))
	m.lookUpAndSignIn(func() bool { return m.right.Load() >= right }, func() {
		c.primaries[kills%3].do(t, "CLIENT", "KILL", "TYPE", "normal")
		kills++
	})
	for _, node := range c.primaries {
		wantEnds(t, node.url())
	}
}

// ---------------------------------------------------------------------------------------------------
// Redis: TLS.

// privateCertificate is its own authority, for one host alone: a name or an IP address.
func privateCertificate(t *testing.T, host string) (certificate, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		NotAfter:              time.Now().Add(24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	if ip := net.ParseIP(host); ip != nil {
		template.IPAddresses = []net.IP{ip}
	} else {
		template.DNSNames = []string{host}
	}
	public := private.Public()
	certificate, err = x509.CreateCertificate(cryptorand.Reader, template, template, public, private)
	if err != nil {
		t.Fatal(err)
	}
	key, err = x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})
}

// tlsRedis are servers over TLS with one certificate, which is its own authority.
type tlsRedis struct {
	*redisHost
	options []string
	trust   string // SSL_CERT_FILE=…
}

func newTLSRedis(t *testing.T, name string) *tlsRedis {
	t.Helper()
	certificate, key := privateCertificate(t, name)
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, certificate, 0o600); err != nil {
		t.Fatal(err)
	}
	host := ownRedisHost(t)
	certFile, keyFile := host.write(t, "cert.pem", certificate), host.write(t, "key.pem", key)
	return &tlsRedis{host, []string{"--tls-ca-cert-file", certFile, "--tls-cert-file", certFile,
		"--tls-key-file", keyFile, "--requirepass", "s3cret"}, "SSL_CERT_FILE=" + file}
}

// serve starts a server, and returns its URL past TLS and its port over it.
func (r *tlsRedis) serve(t *testing.T, options ...string) (admin, port string) {
	t.Helper()
	port = r.port()
	server := r.start(t, slices.Concat(r.options, []string{"--tls-port", port}, options)...)
	return "redis://:s3cret@" + server.addr(), port
}

// serveCluster starts two nodes, each with half of the slots, which announce themselves by IP address or by
// the name localhost.
func (r *tlsRedis) serveCluster(t *testing.T, announce string) (port string) {
	t.Helper()
	var admins, ports []string
	for i := range 2 {
		bus := r.port()
		admin, port := r.serve(t, "--tls-auth-clients", "no", "--tls-cluster", "yes",
			"--cluster-enabled", "yes", "--cluster-port", bus, "--cluster-config-file", bus+".nodes",
			"--cluster-announce-hostname", "localhost", "--cluster-preferred-endpoint-type", announce)
		redisDo(t, admin, "CLUSTER", "ADDSLOTSRANGE", 8192*i, 8192*i+8191)
		admins, ports = append(admins, admin), append(ports, port)
		if i == 1 {
			redisDo(t, admins[0], "CLUSTER", "MEET", "127.0.0.1", port, bus)
		}
	}
	for _, admin := range admins {
		eventually(t, 30*time.Second, "the cluster serves", func() bool {
			info, _ := redis.String(redisDo(t, admin, "CLUSTER", "INFO"), nil)
			return strings.Contains(info, "cluster_state:ok")
		})
	}
	return ports[0]
}

func TestRedisOverTLSWithAPrivateCA(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name        string
		certificate string // for this host
		host        string // in REDIS_URL
		announce    string // how a cluster announces its nodes; "": no cluster
		distrust    bool
		cause       string // why it is refused; "": it is not
	}{
		{name: "an address", certificate: "127.0.0.1", host: "127.0.0.1", announce: "ip"},
		{name: "a name, nodes announced by address", certificate: "localhost", host: "localhost",
			announce: "ip"},
		{name: "a name, nodes announced by it", certificate: "localhost", host: "localhost",
			announce: "hostname"},
		{name: "an address, nodes announced by name", certificate: "127.0.0.1", host: "127.0.0.1",
			announce: "hostname", cause: "wanted to match localhost"},
		{name: "a name, asked by address", certificate: "localhost", host: "127.0.0.1", announce: "ip",
			cause: "doesn't contain any IP SANs"},
		{name: "of an unknown authority", certificate: "127.0.0.1", host: "127.0.0.1", distrust: true,
			cause: "certificate signed by unknown authority"},
		{name: "clients need one, too", certificate: "127.0.0.1", host: "127.0.0.1",
			cause: "certificate required"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := newTLSRedis(t, tt.certificate)
			var port string
			if tt.announce != "" {
				port = r.serveCluster(t, tt.announce)
			} else {
				_, port = r.serve(t, "--tls-auth-clients", "yes")
			}
			if tt.distrust {
				r.trust = ""
			}
			s := startProcess(t, r.trust, "REDIS_URL=rediss://:s3cret@"+tt.host+":"+port)
			s.secret("s3cret")
			if tt.cause == "" {
				s.wantTurns(20) // on both
				s.log.find(t, "Redis is a cluster")
				return
			}
			s.expectErrors()
			eventually(t, 10*time.Second, tt.cause, func() bool {
				s.status("GET /user", "", cookie(newUUID()))
				return strings.Contains(s.log.String(), tt.cause)
			})
		})
	}
}

// ---------------------------------------------------------------------------------------------------
// Operating: what the log says.

func TestStartSaysWhatIsInUse(t *testing.T) {
	t.Parallel()
	target := "127.0.0.1:" + freePort() + "/3" // where there is no Redis
	s := start(t, "REDIS_URL=redis://svc:wr0ng@"+target, "COOKIE_SECURE=false")
	s.expectErrors()
	s.secret("wr0ng", "svc")
	line := s.log.find(t, "listening")
	if line["accounts"] != s.dbPath || line["sessions"] != "redis://"+target ||
		line["version"] != buildVersion() {
		t.Errorf("got %v, want sessions in %s", line, target)
	}
	s.log.find(t, "COOKIE_SECURE=false: session cookies travel over plain HTTP, "+
		"where anybody on the way can read them")
	s = start(t)
	if line := s.log.find(t, "listening"); line["sessions"] != "sqlite "+s.dbPath {
		t.Errorf("got %v, want sessions in sqlite", line)
	}
}

func TestLogLevels(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]string{
		"info":  "INFO WARN ERROR",
		"warn":  "WARN ERROR",
		"error": "ERROR",
	} {
		status, _, log := runWith(t.Context(), t, nil, "LOG_LEVEL="+name, "COOKIE_SECURE=false",
			"REDIS_URL=redis://127.0.0.1:"+freePort())
		for _, level := range []string{"INFO", "WARN", "ERROR"} {
			if status != 0 || strings.Contains(log, `"level":"`+level) != strings.Contains(want, level) {
				t.Errorf("LOG_LEVEL=%s: exit status %d, want only %s in: %s", name, status, want, log)
			}
		}
	}
}

func TestWhateverBecomesOfStandardErrorTheServiceServesOnAndStops(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		before string // the program, in the shell
		pipe   func(t *testing.T, r, w *os.File)
	}{
		"closed":                   {before: "exec 2>&-"},
		"on a full disk":           {before: "exec 2>/dev/full"},
		"a pipe without a reader":  {before: "true", pipe: func(_ *testing.T, r, _ *os.File) { r.Close() }},
		"a pipe that nobody reads": {before: "true", pipe: fillPipe},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			addr := "127.0.0.1:" + freePort()
			s := newProcess(t, beforeEnv+"="+tt.before, "ADDR="+addr)
			s.url = "http://" + addr
			if tt.pipe != nil {
				r, w, err := os.Pipe()
				if err != nil {
					t.Fatal(err)
				}
				defer r.Close()
				defer w.Close()
				tt.pipe(t, r, w)
				s.process.Stderr = w
			}
			s.launch()
			eventually(t, 20*time.Second, "the service listens", func() bool {
				conn, err := net.Dial("tcp", addr)
				if err == nil {
					conn.Close()
				}
				return err == nil
			})
			user, id := s.register(newEmail())
			s.signIn(user.Email, cookie(id))
			s.want(401, id)
			elapsed := startWatch()
			s.stop() // which checks the exit status
			if d := elapsed(); d > 5*time.Second {
				t.Errorf("ended after %v, want at once", d)
			}
		})
	}
}

// fillPipe writes until a pipe takes nothing more.
func fillPipe(t *testing.T, _, w *os.File) {
	t.Helper()
	var err error
	for err == nil {
		w.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		_, err = w.Write(make([]byte, 512))
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
}

func TestLinesThatCannotBeWrittenAreCountedAndNobodyWaitsForThem(t *testing.T) {
	for _, logged := range []int{1, 5000} { // in the queue, and more than it takes
		synctest.Test(t, func(t *testing.T) {
			var written bytes.Buffer
			writes := 0
			goOn := make(chan struct{})
			lines := newLineWriter(writerFunc(func(text []byte) (int, error) {
				<-goOn
				writes++
				switch writes {
				case 2:
					return 0, syscall.EPIPE
				case 3: // the disk takes a part of it
					n, _ := written.Write(text[:10])
					return n, syscall.ENOSPC
				}
				return written.Write(text)
			}))
			log := slog.New(slog.NewJSONHandler(lines, nil))
			begin := time.Now()
			for range logged {
				log.Info("line")
			}
			lines.close()
			if d := time.Since(begin); d != 500*time.Millisecond {
				t.Errorf("%d lines that nobody takes, and the end: wait %v, want 500 ms", logged, d)
			}
			close(goOn)
			lines.close()
			received := &logBuffer{text: written}
			told := len(received.lines("line"))
			for _, gap := range received.lines("log lines dropped") {
				told += int(gap["dropped"].(float64))
			}
			if told != logged {
				t.Errorf("%d lines are written or told of, want %d:\n%.2000s", told, logged, received)
			}
		})
	}
}

func TestWhatClientsRepeatIsLoggedOnceASecond(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		msg, route string
		status     int
		client     any
		trouble    error // of the sessions
	}{
		{"throttled", signInRoute, 429, oneAddr, nil},
		{"too busy", registerRoute, 503, oneAddr, nil},
		{"store out of reach", registerRoute, 503, nil, errUnavailable},
		{"store refuses", registerRoute, 503, nil, errRefused},
	} {
		inVirtualTime(t, tt.msg, func(t *testing.T) {
			s := newUnit(t, unitConfig{})
			s.expectErrors()
			s.trouble = failing("Create", tt.trouble)
			if tt.msg == "throttled" {
				s.failures(10, adaEmail)
			}
			if tt.msg == "too busy" {
				takeSlot(s, s.server)
				for range maxLine {
					go s.server.gate.newRegistration(clientAt(oneAddr)).acquire(s.Context())
				}
				synctest.Wait()
			}
			for i := range 101 {
				if i == 100 {
					time.Sleep(10 * time.Second) // what follows a pause is logged at once
				}
				if a := s.request(s.Context(), oneAddr, tt.route, adaEmail, password); a.status != tt.status {
					s.Fatalf("%s: status %d, want %d", tt.route, a.status, tt.status)
				}
				time.Sleep(70 * time.Millisecond)
			}
			lines := s.log.lines(tt.msg)
			if n := eventsOf(lines); n != 101 || len(lines) != 9 || lines[8]["client"] != tt.client {
				s.Errorf("%d lines stand for %v events of client %v, want 9 for 101:\n%s", len(lines), n,
					tt.client, s.log)
			}
		})
	}
}

func TestEachStoreHasLinesOfItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newUnit(t, unitConfig{})
		s.expectErrors()
		s.trouble = failing("Ping", errUnavailable)
		s.breakFile()
		const checks = 21
		for range checks {
			s.request(s.Context(), oneAddr, "GET /healthz", "", "")
			synctest.Wait()
			time.Sleep(100 * time.Millisecond)
		}
		s.server.limited.flush()
		events := map[any]float64{}
		lines := s.log.lines("store out of reach")
		for _, line := range lines {
			events[line["store"]] += line["count"].(float64)
		}
		if events["sessions"] != checks || events["accounts"] != checks || len(lines) > 2*4 {
			s.Errorf("events of stores: %v, want %d each, a line a second each:\n%s", events, checks, s.log)
		}
	})
}

// Who is on call sees the end of an outage, once.
func TestAStoreThatAnswersAgainIsTold(t *testing.T) {
	type step struct {
		after time.Duration // that passes before
		fails error         // as a lookup does then
		away  float64       // seconds, then
		back  string        // the time away that is logged then
	}
	const second = time.Second
	away := fmt.Errorf("%w: no route to host", errUnavailable)
	refuses := &refusedError{server: "redis:6379", text: "OOM"}
	for what, steps := range map[string][]step{
		"asked once": {{fails: away}, {after: 90 * second, back: "1m30s"}, {after: second}},
		"away twice": {
			{fails: away}, {after: second, back: "1s"}, {fails: away}, {after: second, back: "1s"},
		},
		"no session":  {{fails: away}, {after: 2 * second, fails: errNoSession, back: "2s"}},
		"it refused":  {{fails: refuses}, {after: second}},
		"client left": {{fails: context.Canceled}, {after: 2 * second}},
		"refuses": {
			{fails: away}, {after: 2 * second, fails: refuses, away: 2}, {after: second, back: "3s"},
		},
		"one node of several is away": {
			{fails: away}, {after: second / 2, away: 0.5}, {after: second / 2, fails: away, away: 1},
			{after: second / 2, away: 1.5}, {after: second / 2, back: "2s"},
		},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := newUnit(t, unitConfig{})
			s.expectErrors()
			told := 0
			for i, step := range steps {
				time.Sleep(step.after)
				s.trouble = failing("Get", step.fails)
				ctx, leave := context.WithCancel(t.Context())
				if step.fails == context.Canceled {
					leave()
					s.trouble = failing("Get", away)
				}
				s.serve(ctx, oneAddr, "GET /user", "", cookie(newUUID()))
				leave()
				lines := s.log.lines("store is back")
				if step.back != "" {
					told++
					line := lines[len(lines)-1]
					if line["away"] != step.back || line["store"] != "sessions" || line["level"] != "INFO" {
						t.Errorf("%s, step %d: log line %v, want away %s", what, i+1, line, step.back)
					}
				}
				away := s.server.metrics()["sessions_away_seconds"]
				if away != step.away || len(lines) != told {
					t.Errorf("%s, step %d: away for %v s, want %v; %v", what, i+1, away, step.away, lines)
				}
			}
		})
	}
}

func TestMoreConnectionsThanFileDescriptors(t *testing.T) {
	t.Parallel()
	s := startProcess(t, beforeEnv+"=ulimit -n 60")
	_, id := s.register(newEmail())
	begin := time.Now()
	var conns []net.Conn
	for range 200 {
		conns = append(conns, s.dialRaw())
	}
	s.want(200, id) // on the connection it had
	const warning = "cannot accept connections"
	eventually(t, 20*time.Second, "two warnings", func() bool { return len(s.log.lines(warning)) >= 2 })
	lines := s.log.lines(warning)
	if elapsed := time.Since(begin); len(lines) > 1+int(elapsed/time.Second) {
		t.Errorf("%d warnings within %v, want one a second", len(lines), elapsed)
	}
	cause, _ := lines[0]["err"].(string)
	if lines[0]["level"] != "WARN" || !strings.Contains(cause, "too many") {
		t.Errorf("log line %v, want a WARN and the cause", lines[0])
	}
	for _, conn := range conns {
		conn.Close()
	}
	s.client.CloseIdleConnections()
	s.want(200, id)
	s.register(newEmail())
}

// ---------------------------------------------------------------------------------------------------
// Operating: stopping and upgrading.

func TestTheStopIsSeenBeforeTheDoorShuts(t *testing.T) {
	t.Parallel()
	s := startProcess(t, "SHUTDOWN_DELAY=1s")
	_, id := s.register(newEmail())
	begin := time.Now()
	var stopping sync.WaitGroup
	stopping.Go(s.stop)
	s.log.find(t, "shutting down")
	for route, want := range map[string]int{"/healthz": 503, "/user": 200} {
		conn := s.dialRaw()
		io.WriteString(conn, httpText("GET "+route, "", cookie(id)))
		a := readHTTP(t, "GET "+route, bufio.NewReader(conn))
		if a.status != want || !a.last {
			t.Errorf("GET %s on a new connection: status %d, the last: %t, want %d and the last",
				route, a.status, a.last, want)
		}
	}
	stopping.Wait()
	if d := time.Since(begin); d < time.Second || d > 10*time.Second {
		t.Errorf("ended after %v, want a little more than 1 s", d)
	}
	if _, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://")); err == nil {
		t.Error("a stopped service takes connections")
	}
}

func TestShutdownFinishesWhatRunsInTime(t *testing.T) {
	t.Parallel()
	const sec = time.Second
	for name, tt := range map[string]struct {
		cost            string
		bodyAfter       time.Duration // 0: none
		second          bool          // signal
		atLeast, atMost time.Duration
		status          int
	}{
		"what runs is finished": {cost: "10", bodyAfter: sec / 2, atLeast: sec / 2, atMost: 9 * sec,
			status: 201},
		"but for 10 s at most": {cost: "15", bodyAfter: 9*sec + sec/2, atLeast: 9 * sec,
			atMost: 15 * sec},
		"and not at a second signal": {cost: "15", second: true, atMost: 7 * sec},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := startProcess(t, "BCRYPT_COST="+tt.cost)
			conn := s.dialRaw()
			body := credentials(newEmail(), password)
			request := httpText("POST /user", body, "Expect: 100-continue")
			io.WriteString(conn, strings.TrimSuffix(request, body))
			answers := bufio.NewReader(conn)
			if line, err := answers.ReadString('\n'); err != nil || !strings.Contains(line, "100") {
				t.Fatalf("got %q, %v: the handler does not read", line, err)
			}
			answers.ReadString('\n')
			begin := time.Now()
			var stopping sync.WaitGroup
			stopping.Go(s.stop) // by the first signal
			s.log.find(t, "shutting down")
			if tt.second {
				s.expectErrors() // it ends by the signal
			}
			for tt.second && s.process.Process.Signal(syscall.SIGTERM) == nil {
				time.Sleep(5 * time.Millisecond) // the first may still be at work
			}
			if tt.bodyAfter > 0 {
				time.Sleep(tt.bodyAfter - time.Since(begin))
				io.WriteString(conn, body)
			}
			if tt.status != 0 {
				a := readHTTP(t, "POST /user", answers)
				if a.status != tt.status || !a.last {
					t.Errorf("the request that ran: %+v, want %d and Connection: close", a, tt.status)
				}
			}
			stopping.Wait()
			if d := time.Since(begin); d < tt.atLeast || d > tt.atMost {
				t.Errorf("ended after %v, want %v to %v", d, tt.atLeast, tt.atMost)
			}
			if cut := len(s.log.lines("requests cut off")) > 0; cut != (tt.atLeast > 5*time.Second) {
				t.Errorf("requests are cut off: %t\n%s", cut, s.log)
			}
		})
	}
}

func TestShutdownFinishesTheUpgradeOfAHash(t *testing.T) {
	t.Parallel()
	s := start(t, "BCRYPT_COST=5", "REDIS_URL="+redisURL(t))
	user := s.addAccount(newEmail(), 4)
	db := openSQL(t, s.dbPath)
	defer db.Close()
	db.SetMaxOpenConns(1)
	if _, err := db.Exec(`BEGIN IMMEDIATE`); err != nil {
		t.Fatal(err)
	}
	s.signIn(user.Email) // which writes to Redis alone
	unlocked := make(chan error, 1)
	time.AfterFunc(time.Second/2, func() { // after the service could have ended, before SQLite gives up
		_, err := db.Exec(`ROLLBACK`)
		unlocked <- err
	})
	s.stop()
	if err := <-unlocked; err != nil {
		t.Fatal(err)
	}
	hash := query[string](s, `SELECT password FROM users WHERE id = ?`, user.ID)
	if !strings.HasPrefix(hash, "$2a$05$") {
		t.Errorf("after the end the hash begins %.7s, want $2a$05$", hash)
	}
}

func TestTheStartHeedsTheSignalToStop(t *testing.T) {
	t.Parallel()
	path := originalFile(t, originalDDL).dbPath
	defer lockFile(t, path)()
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(200*time.Millisecond, cancel)
	begin := time.Now()
	status, _, stderr := runWith(ctx, t, nil, "DB_PATH="+path)
	if d := time.Since(begin); status != 0 || d > 5*time.Second || strings.Count(stderr, `"stopped"`) != 1 {
		t.Errorf("exit status %d after %v, want 0 at once: %s", status, d, stderr)
	}
}

func TestRollingOutLosesNoRequest(t *testing.T) {
	t.Parallel()
	for range rounds(2, 20) {
		s := startProcess(t, "REDIS_URL="+redisURL(t))
		_, id := s.register(newEmail())
		var answered, ready atomic.Int64
		together(32, func(int) {
			client := &http.Client{Transport: &http.Transport{}} // with a connection of its own
			defer client.CloseIdleConnections()
			answer := time.Now() // the last one
			for i := 1; ; i++ {
				req, _ := http.NewRequest("GET", s.url+"/user", nil)
				req.Header.Set("Cookie", cookieName+"="+id)
				resp, err := client.Do(req)
				if err != nil && i > 20 && time.Since(answer) > 200*time.Millisecond {
					return // idle for too long: a busy machine has kept this client from running
				}
				if err != nil || resp.StatusCode != 200 { // and no answer said that it is the last one
					t.Errorf("GET /user on an open connection, %d answered before: %v, %v", answered.Load(),
						resp, err)
					go s.stop()
					return
				}
				io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				answer = time.Now()
				answered.Add(1)
				if i == 20 && ready.Add(1) == 32 { // every connection is open
					go s.stop()
				}
				if resp.Close {
					return
				}
				time.Sleep(rand.N(20 * time.Millisecond)) // as clients do: the connection looks idle
			}
		})
		s.stop()
	}
}

// ---------------------------------------------------------------------------------------------------
// Operating: the account file.

func TestNewFilesAndRowsAreWhatPrismaMakes(t *testing.T) {
	t.Parallel()
	s := start(t)
	made := query[string](s, `SELECT group_concat(sql || char(59, 10), '') FROM
		(SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid LIMIT 2)`)
	if made != originalDDL {
		t.Errorf("the file begins with\n%swant\n%s", made, originalDDL)
	}
	user, _ := s.register(" New@Example.com ")
	got := query[string](s, `SELECT concat_ws(' ', id, quote(name), quote(email), quote(createdAt),
		quote(updateAt), substr(password, 1, 3)) FROM users`)
	created, _ := time.Parse(timeFormat, user.CreatedAt)
	// quote leaves integers as they are.
	want := fmt.Sprintf("%s 'Ada Lovelace' 'New@Example.com' %[2]d %[2]d $2a", user.ID, created.UnixMilli())
	if got != want || user.Email != "New@Example.com" {
		t.Errorf("Prisma reads %s, want %s; answered %q", got, want, user.Email)
	}
}

func TestACommitIsOnDiskBeforeItIsAnswered(t *testing.T) {
	t.Parallel()
	db := openTestDatabase(t)
	var got string
	err := db.withWriter(t.Context(), "testing", func(tx *sql.Tx) error {
		return tx.QueryRow(`SELECT concat_ws(' ', journal_mode, synchronous, foreign_keys, temp_store)
			FROM pragma_journal_mode, pragma_synchronous, pragma_foreign_keys, pragma_temp_store`).Scan(&got)
	})
	if want := "wal 2 1 2"; err != nil || got != want { // synchronous 2 is FULL, temp_store 2 is memory
		t.Errorf("pragmas %s, %v, want %s", got, err, want)
	}
}

func TestACrashLosesNothingThatWasAnswered(t *testing.T) {
	each(t, func(t *testing.T, backend string) {
		path := filepath.Join(t.TempDir(), "users.db")
		var accounts, sessions sync.Map // that were answered: emails, and emails by session id
		for range rounds(3, 50) {
			s := startProcess(t, backend, "DB_PATH="+path)
			s.expectErrors()
			user := s.addAccount(newEmail(), bcrypt.MinCost)
			accounts.Store(user.Email, true)
			var answers atomic.Int64
			last := 2 + rand.Int64N(10)
			together(4, func(i int) {
				for {
					route, email := signInRoute, user.Email
					if i%2 == 0 {
						route, email = registerRoute, newEmail()
					}
					a, err := s.send(route, credentials(email, password))
					if err != nil {
						return
					}
					if a.cookie == nil {
						if a.status != 503 { // too busy, on a machine that is
							t.Errorf("%s: status %d, want 200 or 201: %s", route, a.status, a.body)
						}
						continue
					}
					accounts.Store(email, true)
					sessions.Store(a.cookie.Value, email)
					if answers.Add(1) == last {
						s.process.Process.Kill()
					}
				}
			})
			s.stop()
		}
		s := startProcess(t, backend, "DB_PATH="+path)
		for id, email := range sessions.Range {
			if a := s.want(200, id.(string)); !strings.Contains(a.body, email.(string)) {
				t.Errorf("the session of %s is %s", email, a.body)
			}
		}
		s.register(newEmail())
		s.holds(&accounts)
	})
}

func TestAFullDiskIs503AndLosesNothing(t *testing.T) {
	t.Parallel()
	s := startProcess(t, beforeEnv+"=ulimit -f 200", "REDIS_URL="+redisURL(t)) // blocks of 512 or 1,024 bytes
	s.expectErrors()
	user, id := s.register(newEmail())
	var accounts sync.Map
	accounts.Store(user.Email, true)
	status := 201
	for i := 0; status == 201 && i < 100; i++ {
		email := newEmail()
		if status = s.status("POST /user", credentials(email, password)); status == 201 {
			accounts.Store(email, true)
		}
	}
	if status != 503 {
		t.Errorf("POST /user: status %d, want 503", status)
	}
	s.want(200, id)
	s.stop()
	s = startProcess(t, "REDIS_URL="+redisURL(t), "DB_PATH="+s.dbPath)
	s.register(newEmail())
	s.holds(&accounts)
}

func TestNoStatementReadsAWholeTable(t *testing.T) {
	t.Parallel()
	s := newUnit(t, unitConfig{})
	file := openSQL(t, s.dbPath)
	defer file.Close()
	whole := regexp.MustCompile(`SCAN (users|sessions)`)
	for _, statement := range s.server.accounts.statements() {
		if strings.HasPrefix(statement.query, "SELECT EXISTS") {
			continue // it ends at the first row
		}
		rows, err := file.Query("EXPLAIN QUERY PLAN "+statement.query, make([]any, 7)...)
		if err != nil {
			t.Fatalf("%s: %v", statement.query, err)
		}
		for rows.Next() {
			var step string
			if err := rows.Scan(new(int), new(int), new(int), &step); err != nil || whole.MatchString(step) {
				t.Errorf("%s: %s, %v", statement.query, step, err)
			}
		}
		if err := rows.Err(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAWriteKeepsOtherProgramsOutFromItsBeginning(t *testing.T) {
	t.Parallel()
	file := originalFile(t, originalDDL)
	db, err := openDatabase(t.Context(), file.dbPath)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	other := openSQL(t, file.dbPath)
	defer other.Close()
	err = db.withWriter(t.Context(), "testing", func(*sql.Tx) error { // no change yet
		_, err := other.Exec(`PRAGMA busy_timeout = 0; DELETE FROM users`)
		return err
	})
	if !errors.Is(err, errRefused) {
		t.Errorf("another program's write: %v, want errRefused", err)
	}
}

func TestAReadWaitsForAConnectionForThreeSecondsAtMost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := openTestDatabase(t)
		release := make(chan struct{})
		var busy sync.WaitGroup
		for range 100 { // more than there are connections
			busy.Go(func() {
				db.withReader(t.Context(), "testing", func() error {
					<-release
					return nil
				})
			})
		}
		synctest.Wait()
		store := &sqliteSessions{db}
		begin := time.Now()
		_, err := store.Get(context.Background(), newUUID())
		if took := time.Since(begin); !errors.Is(err, errUnavailable) || took > 3*time.Second {
			t.Errorf("Get while all are busy: %v after %v, want errUnavailable within 3 s", err, took)
		}
		close(release)
		busy.Wait()
		if _, err := store.Get(t.Context(), newUUID()); !errors.Is(err, errNoSession) {
			t.Errorf("Get: %v, want errNoSession", err)
		}
	})
}

func TestEmbeddedSessionsOutliveARestart(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "a folder?#%20 ü&_pragma=x", "users.db")
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	s := start(t, "DB_PATH="+path)
	user, id := s.register(newEmail())
	files, _ := filepath.Glob(filepath.Join(filepath.Dir(path), "*")) // the write-ahead log, too
	for _, file := range append(files, path) {
		if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v, want it readable to its owner only", file, info, err)
		}
		text, err := os.ReadFile(file)
		if err != nil || bytes.Contains(text, []byte(id)) || bytes.Contains(text, []byte(password)) {
			t.Errorf("%s holds a session id or a password (%v)", file, err)
		}
	}
	s.stop()
	s = start(t, "DB_PATH="+path)
	if a := s.want(200, id); a.body != userJSON(user) {
		t.Errorf("got %s, want %s", a.body, userJSON(user))
	}
	s.signIn(user.Email)
}

func TestExpiredSessionsAreSwept(t *testing.T) {
	t.Parallel()
	s := newUnit(t, unitConfig{})
	store := &sqliteSessions{s.server.accounts}
	s.exec(`WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 150)
		INSERT INTO sessions SELECT randomblob(32), '', '', '', '', '', i FROM n`)
	for _, want := range []int{51, 2} { // each that is made sweeps a hundred
		err := store.Create(t.Context(), newUUID(), testUser(1), time.Hour)
		if n := query[int](s.service, `SELECT count(*) FROM sessions`); err != nil || n != want {
			t.Errorf("%d rows, %v, want %d", n, err, want)
		}
	}
}

// SQLite before 3.37 reads no file that has a STRICT table.
func TestSessionsOfAnEarlierVersionLiveOnInATableThatIsNotStrict(t *testing.T) {
	t.Parallel()
	file := originalFile(t, strings.Replace(schema, ") WITHOUT ROWID", ") STRICT, WITHOUT ROWID", 1))
	user, id := testUser(1), newUUID()
	file.exec(`INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?)`, hashID(id), user.ID, user.Name, user.Email,
		user.CreatedAt, user.UpdatedAt, time.Now().Add(time.Hour).UnixMilli())
	for range 2 {
		s := start(t, "DB_PATH="+file.dbPath)
		if a := s.want(200, id); a.body != userJSON(user) {
			t.Errorf("got %s, want %s", a.body, userJSON(user))
		}
		s.register(newEmail())
		s.stop()
		const older = `SELECT group_concat(name || iif(strict, ' STRICT', ''), ' ') FROM pragma_table_list
			WHERE schema = 'main' AND name NOT LIKE 'sqlite%'`
		if got := query[string](file, older); got != "sessions users" && got != "users sessions" {
			t.Errorf("tables %s, want users and sessions, not STRICT", got)
		}
		file.holds(&sync.Map{})
	}
}

// A pipe in place of the shared memory cannot be mapped, as a file on some file systems (FUSE, 9p).
func TestAFileKeepsItsJournalModeWhereThereIsNoSharedMemory(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"delete", "wal"} {
		file := originalFile(t, originalDDL, "ada@example.com")
		file.exec(`PRAGMA journal_mode = ` + mode)
		pipe := file.dbPath + "-shm"
		if err := syscall.Mkfifo(pipe, 0o600); err != nil {
			t.Fatal(err)
		}
		status, _, stderr := runWith(t.Context(), t, nil, "DB_PATH="+file.dbPath)
		if status != 1 || !strings.Contains(stderr, "no shared memory") ||
			!strings.Contains(stderr, filepath.Dir(file.dbPath)) {
			t.Errorf("status %d, want 1 and that there is no shared memory: %s", status, stderr)
		}
		os.Remove(pipe)
		if got := query[string](file, `PRAGMA journal_mode`); got != mode {
			t.Errorf("the file is left in mode %s, want %s", got, mode)
		}
		if n := query[int](file, `SELECT count(*) FROM users`); n != 1 {
			t.Errorf("%d accounts, want 1", n)
		}
	}
}

func TestFilesOfOtherProgramsAreLeftAsTheyWere(t *testing.T) {
	t.Parallel()
	with := func(old, new string) string { return strings.Replace(originalDDL, old, new, 1) }
	const foreign = "another program's"
	for name, tt := range map[string]struct {
		ddl     string
		message []string // beside foreign; none: the file is taken
	}{
		"other columns":      {`CREATE TABLE users (uid INTEGER, mail TEXT)`, []string{"users", "email"}},
		"a column to feed":   {with(`"name"`, `"role" TEXT NOT NULL, "name"`), []string{"users.role"}},
		"a column to let be": {with(`"name"`, `"age" INT, "role" TEXT NOT NULL DEFAULT '', "name"`), nil},
		"others' sessions":   {`CREATE TABLE sessions (sid TEXT)`, []string{"sessions", "expires_at"}},
		"an email twice": {with(`CREATE UNIQUE`, `INSERT INTO users VALUES (1, 2, 3, 4, 5, 6),
			(7, 2, 3, 4, 5, 6); --`), []string{"users.email"}},
		"a view": {`CREATE VIEW users AS SELECT 1 id, 2 name, 3 email, 4 password, 5 createdAt, 6 updateAt`,
			[]string{"users", "view"}},
		"the last version's": {`PRAGMA journal_mode = WAL; CREATE TABLE users (id TEXT NOT NULL PRIMARY KEY,
			name TEXT NOT NULL, email TEXT NOT NULL UNIQUE, password_hash TEXT NOT NULL,
			created_at TEXT NOT NULL, updated_at TEXT NOT NULL) STRICT`, []string{"users", "createdAt"}},
	} {
		if tt.message != nil {
			tt.message = append(tt.message, foreign)
		}
		t.Run(name, func(t *testing.T) { runOn(t, originalFile(t, tt.ddl).dbPath, tt.message...) })
	}
	t.Run("a log left behind", func(t *testing.T) {
		file := originalFile(t, `PRAGMA journal_mode = WAL; CREATE TABLE users (uid INTEGER)`)
		open := openSQL(t, file.dbPath)
		defer open.Close()
		if _, err := open.Exec(`INSERT INTO users VALUES (1)`); err != nil {
			t.Fatal(err)
		}
		crashed := &service{TB: t, dbPath: filepath.Join(t.TempDir(), "dev.db")}
		if err := os.CopyFS(filepath.Dir(crashed.dbPath), os.DirFS(filepath.Dir(file.dbPath))); err != nil {
			t.Fatal(err)
		}
		status, _, stderr := runWith(t.Context(), t, nil, "DB_PATH="+crashed.dbPath)
		if status != 1 || !strings.Contains(stderr, foreign) {
			t.Errorf("status %d, want 1: %s", status, stderr)
		}
		const content = `SELECT (SELECT group_concat(uid) FROM users) ||
			(SELECT group_concat(sql) FROM sqlite_master)`
		if got := query[string](crashed, content); got != "1CREATE TABLE users (uid INTEGER)" {
			t.Errorf("the file holds %s", got)
		}
	})
	const remove = "has to be removed"
	for _, tt := range []struct {
		name, message string
		change        func(path string)
	}{
		{"a backup beside another file's log", remove, func(string) {}},
		{"an empty file beside another file's log", remove, func(path string) { os.Truncate(path, 0) }},
		// A service that runs may yet write to such a log.
		{"a backup beside an empty log", remove, func(path string) { os.Truncate(path+"-wal", 0) }},
		{"no file beside a log", "put the file back", func(path string) { os.Remove(path) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := besideALog(t)
			tt.change(path)
			runOn(t, path, "dev.db-wal", tt.message)
		})
	}
	text := filepath.Join(t.TempDir(), "notes.txt")
	os.WriteFile(text, bytes.Repeat([]byte("no database "), 1000), 0o600)
	runOn(t, text, "not a database")
	runOn(t, t.TempDir(), "directory")
	runOn(t, filepath.Join(t.TempDir(), "no", "users.db"), "no such")
	if os.Geteuid() != 0 { // to whom nothing is forbidden
		path := originalFile(t, originalDDL).dbPath
		os.Chmod(path, 0o400)
		runOn(t, path, "permission")
		os.Chmod(path, 0o600)
		os.Chmod(filepath.Dir(path), 0o500)
		runOn(t, path, "the folder", filepath.Dir(path), "must be writable", "-wal")
		os.Chmod(filepath.Dir(path), 0o700)
	}
}

// besideALog makes a file that was moved in beside the log that a crash had left of another one.
func besideALog(t *testing.T) (path string) {
	t.Helper()
	file := originalFile(t, `PRAGMA journal_mode = WAL;`+originalDDL)
	open := openSQL(t, file.dbPath)
	defer open.Close()
	if _, err := open.Exec(`INSERT INTO users VALUES ('1', 'Ada', 'late@b', '', 0, 0)`); err != nil {
		t.Fatal(err)
	}
	log, err := os.ReadFile(file.dbPath + "-wal")
	if err != nil {
		t.Fatal(err)
	}
	backup := originalFile(t, originalDDL, "early@example.com")
	if err := os.WriteFile(backup.dbPath+"-wal", log, 0o600); err != nil {
		t.Fatal(err)
	}
	return backup.dbPath
}

// runOn runs the program on a file until it listens, and checks what it says: nothing, or that it cannot run.
// Then what stands at the path must be as it was.
func runOn(t *testing.T, path string, message ...string) {
	t.Helper()
	files := func() string {
		text := ""
		names, _ := filepath.Glob(path + "*")
		for _, name := range names {
			if !strings.HasSuffix(name, "-shm") { // which whoever reads a log uses
				content, _ := os.ReadFile(name)
				text += name + string(content)
			}
		}
		return text
	}
	before := files()
	status, _, stderr := runWith(t.Context(), t, nil, "DB_PATH="+path)
	listened := strings.Contains(stderr, `"listening"`)
	if want := min(len(message), 1); status != want || listened != (message == nil) {
		t.Errorf("status %d, want %d: %s", status, want, stderr)
	}
	if message == nil {
		return
	}
	text := strings.ReplaceAll(stderr, `\`, "") // which stands before each quote within JSON
	for _, part := range append(message, "DB_PATH", path) {
		if !strings.Contains(text, part) {
			t.Errorf("want %s in: %s", part, text)
		}
	}
	if files() != before {
		t.Errorf("%s: the file changed, or others are beside it", path)
	}
}

// ---------------------------------------------------------------------------------------------------
// Operating: the account file while the service runs.

// fileFault strikes the account file of a service that has two accounts: an early one, with a weak hash, and
// a late one. Beside the file is a backup, made in between.
type fileFault struct {
	strike          func(s *service) (mend func())
	embedded, redis []int  // the statuses of the requests with either store of sessions; none: not tried
	log, cause      string // of the line that tells it
	restart         bool   // another service then starts, while this one still runs
	stopped         bool   // not before this one has ended
	unchanged       bool   // until then what stands at the path is the backup, byte for byte
	early, late     bool   // are there after a restart
}

func TestFaultsOfTheFile(t *testing.T) {
	t.Parallel()
	const (
		refuses    = "store refuses"
		outOfReach = "store out of reach"
		replaced   = "was deleted or replaced: restart the service"
	)
	forGood := func() {}
	move := func(s *service, from, to string) {
		if err := os.Rename(s.dbPath+from, s.dbPath+to); err != nil {
			s.Fatal(err)
		}
	}
	replace := func(s *service) func() {
		move(s, ".backup", "")
		return forGood
	}
	noticed := func(s *service) {
		eventually(s, 5*time.Second, "the health check fails", func() bool {
			return s.status("GET /healthz", "") == 503
		})
	}
	nothing := []int{503, 503, 503, 503, 503}
	for name, fault := range map[string]fileFault{
		"locked": {
			strike:   func(s *service) func() { return lockFile(s, s.dbPath) },
			embedded: []int{200, 200, 503, 503, 503}, redis: []int{200, 200, 200, 503, 204},
			log: refuses, cause: "refused", restart: true, early: true, late: true,
		},
		"overwritten": {
			strike: func(s *service) func() {
				s.exec(`PRAGMA wal_checkpoint(TRUNCATE)`)
				os.WriteFile(s.dbPath, bytes.Repeat([]byte("no database "), 10_000), 0o600)
				return forGood
			},
			redis: []int{503, 200, 503, 503, 204}, // embedded, SQLite may still have the sessions in memory
			log:   outOfReach, cause: "not a database",
		},
		"deleted": {
			strike: func(s *service) func() {
				for _, suffix := range []string{"", "-wal", "-shm"} {
					os.Remove(s.dbPath + suffix)
				}
				return forGood
			},
			embedded: nothing, redis: []int{503, 200, 503, 503, 204},
			log: outOfReach, cause: replaced, restart: true,
		},
		"replaced": {
			strike: replace, embedded: nothing, log: outOfReach, cause: replaced,
			restart: true, early: true,
		},
		"replaced for good": {
			strike: replace, embedded: nothing, log: outOfReach, cause: replaced,
			restart: true, stopped: true, unchanged: true, early: true,
		},
		"deleted, and later replaced": {
			strike: func(s *service) func() {
				os.Remove(s.dbPath)
				noticed(s)
				return replace(s)
			},
			embedded: nothing, log: outOfReach, cause: replaced,
			restart: true, stopped: true, unchanged: true, early: true,
		},
		"locked until writes fail, then replaced": {
			strike: func(s *service) func() {
				unlock := lockFile(s, s.dbPath)
				together(2, func(int) { s.status("POST /user/signin", credentials(newEmail(), password)) })
				together(2, func(int) { s.status("POST /user", credentials(newEmail(), password)) })
				unlock()
				return replace(s)
			},
			embedded: nothing, redis: []int{503, 200, 503, 503, 204}, log: outOfReach, cause: replaced,
			restart: true, stopped: true, unchanged: true, early: true,
		},
		"moved away and back": {
			strike: func(s *service) func() {
				move(s, "", ".away")
				noticed(s)
				move(s, ".away", "")
				return forGood
			},
			embedded: nothing, log: outOfReach, cause: replaced,
			restart: true, stopped: true, early: true, late: true,
		},
		"its log deleted": {
			strike: func(s *service) func() {
				os.Remove(s.dbPath + "-wal")
				return forGood
			},
			embedded: nothing, redis: []int{503, 200, 503, 503, 204}, log: outOfReach, cause: replaced,
			restart: true,
		},
		"its shared memory deleted": {
			strike: func(s *service) func() {
				os.Remove(s.dbPath + "-shm")
				return forGood
			},
			embedded: nothing, log: outOfReach, cause: replaced, restart: true, early: true, late: true,
		},
		"replaced and not noticed": {
			strike: replace, embedded: []int{}, restart: true, stopped: true, unchanged: true, early: true,
		},
		"reduced to the original's schema": { // as prisma db push does
			strike: func(s *service) func() {
				s.exec(`DROP TABLE sessions; DROP INDEX users_email_nocase`)
				return forGood
			},
			embedded: nothing, redis: []int{200, 200, 200, 201, 204},
			log: outOfReach, cause: "restart the service", restart: true, early: true, late: true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if fault.embedded != nil {
				fault.test(t, "REDIS_URL=", fault.embedded)
			}
			if fault.redis != nil {
				fault.test(t, "REDIS_URL="+redisURL(t), fault.redis)
			}
		})
	}
}

func (f fileFault) test(t *testing.T, backend string, statuses []int) {
	s := startProcess(t, backend) // of its own, as a file that is gone stays open
	s.expectErrors()
	early := s.addAccount(newEmail(), bcrypt.MinCost)
	s.exec(`VACUUM INTO ?`, s.dbPath+".backup")
	backup := &service{TB: t, dbPath: s.dbPath + ".backup"}
	backup.exec(`CREATE TABLE "_prisma_migrations" AS SELECT zeroblob(100000)`) // it has another size
	begin := time.Now()
	late, id := s.register(newEmail())
	hashing := 3 * time.Since(begin) // which comes before the file, and slowly under the race detector
	backupBytes, err := os.ReadFile(backup.dbPath)
	if err != nil {
		t.Fatal(err)
	}
	mend := f.strike(s)
	requests := []string{"GET /healthz", "GET /user", "POST /user/signin", "POST /user",
		"DELETE /user/session"}
	for i, want := range statuses {
		email := early.Email
		if requests[i] == "POST /user" {
			email = newEmail()
		}
		limit := 3 * time.Second
		if want < 500 {
			limit = 1400 * time.Millisecond // it does not wait for the file
		}
		if strings.HasPrefix(requests[i], "POST") {
			limit += hashing
		}
		elapsed := startWatch()
		status := s.status(requests[i], credentials(email, password), cookie(id))
		if took := elapsed(); status != want || took > limit {
			t.Errorf("%s: status %d after %v, want %d within %v", requests[i], status, took, want, limit)
		}
	}
	if slices.Contains(statuses, 503) {
		s.wantCause(f.log, f.cause)
	}
	mend()
	if f.stopped {
		s.stop()
	}
	content, err := os.ReadFile(s.dbPath)
	if f.unchanged && (err != nil || !bytes.Equal(content, backupBytes)) {
		t.Errorf("what stands at the path was changed (%v)", err)
	}
	if f.restart {
		f.testRestart(s, backend, map[string]bool{early.Email: f.early, late.Email: f.late})
	}
}

func (f fileFault) testRestart(s *service, backend string, exists map[string]bool) {
	next := startProcess(s, backend, "DB_PATH="+s.dbPath)
	next.wantStatus(200, "GET /healthz", "")
	var accounts sync.Map
	accounts.Store(next.addAccount(newEmail(), bcrypt.MinCost).Email, true)
	for email, want := range exists {
		if want {
			accounts.Store(email, true)
		} else if n := query[int](next, `SELECT count(*) FROM users WHERE email = ?`, email); n != 0 {
			s.Errorf("the account of %s is there after a restart", email)
		}
	}
	s.stop()
	next.holds(&accounts)
	next.stop()
	next.holds(&accounts)
}

// Whatever stands where the folder was, the file is gone for good: the log has to say so.
func TestAFileWhoseFolderIsReplacedIsGone(t *testing.T) {
	t.Parallel()
	folder := filepath.Join(t.TempDir(), "accounts")
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	db, err := openDatabase(t.Context(), filepath.Join(folder, "users.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	if err := db.Ping(t.Context()); err != nil {
		t.Errorf("Ping: %v", err)
	}
	if err := os.Rename(folder, folder+".away"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(folder, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	err = db.Ping(t.Context())
	if !errors.Is(err, errUnavailable) || !strings.Contains(err.Error(), "restart the service") {
		t.Errorf("Ping: %v, want errUnavailable that says to restart", err)
	}
}

func TestLookupsGoOnOrAre503WhileTheFileIsReplaced(t *testing.T) {
	t.Parallel()
	s := startProcess(t)
	s.expectErrors()
	_, id := s.register(newEmail())
	s.exec(`VACUUM INTO ?`, s.dbPath+".backup")
	var answered atomic.Int64
	var looking sync.WaitGroup
	for range 8 {
		looking.Go(func() {
			for refused := 0; refused < 100; answered.Add(1) {
				switch status := s.status("GET /user", "", cookie(id)); status {
				case 200:
				case 503:
					refused++
				default:
					t.Errorf("GET /user: status %d, want 200 or 503", status)
					return
				}
			}
		})
	}
	eventually(t, 10*time.Second, "lookups are answered", func() bool { return answered.Load() > 100 })
	if err := os.Rename(s.dbPath+".backup", s.dbPath); err != nil {
		t.Error(err)
	}
	s.status("GET /healthz", "")
	looking.Wait()
}

// TestServicesStopWritingWhenTheSharedMemoryIsDeleted has two services write to a file that loses its shared
// memory, while a third starts: without it they do not see each other's locks.
func TestServicesStopWritingWhenTheSharedMemoryIsDeleted(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "users.db")
	services := []*service{startProcess(t, "DB_PATH="+path), startProcess(t, "DB_PATH="+path)}
	var accounts sync.Map
	var answered atomic.Int64
	var writing sync.WaitGroup
	for _, s := range services {
		s.expectErrors()
		writing.Go(func() {
			for range 200 {
				email := newEmail()
				if status := s.status("POST /user", credentials(email, password)); status != 201 {
					return
				}
				accounts.Store(email, true)
				answered.Add(1)
			}
			t.Error("it registers accounts without the shared memory")
		})
	}
	eventually(t, 20*time.Second, "both register accounts", func() bool { return answered.Load() > 4 })
	if err := os.Remove(path + "-shm"); err != nil {
		t.Error(err)
	}
	third := startProcess(t, "DB_PATH="+path)
	user, _ := third.register(newEmail())
	accounts.Store(user.Email, true)
	writing.Wait()
	services[0].stop()
	user, _ = third.register(newEmail())
	accounts.Store(user.Email, true)
	services[1].stop()
	third.stop()
	third.holds(&accounts)
}

func TestALinkThatIsTurnedToAnotherFileTakesNoLogWithIt(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	link, target := filepath.Join(folder, "link"), filepath.Join(folder, "users.db")
	if err := os.Symlink("users.db", link); err != nil {
		t.Fatal(err)
	}
	s := startProcess(t, "DB_PATH="+link)
	s.expectErrors()
	user, id := s.register(newEmail())
	s.exec(`VACUUM INTO ?`, filepath.Join(folder, "backup.db"))
	os.Remove(link)
	if err := os.Symlink("backup.db", link); err != nil {
		t.Fatal(err)
	}
	eventually(t, 5*time.Second, "lookups are refused", func() bool {
		return s.status("GET /user", "", cookie(id)) == 503
	})
	s.stop()
	next := startProcess(t, "DB_PATH="+target)
	next.want(200, id)
	next.signIn(user.Email)
}

// ---------------------------------------------------------------------------------------------------
// Operating: metrics.

func TestTheDebugAddressServesDebugAndNoOtherDoesUntilTheEnd(t *testing.T) {
	t.Parallel()
	s := start(t, "DEBUG_ADDR=127.0.0.1:0", "REDIS_URL="+redisURL(t), "LOG_LEVEL=debug")
	s.log.find(t, "session store takes sessions") // of the trial session
	second := start(t, "DEBUG_ADDR=127.0.0.1:0")
	debugGet := func(s *service, path string) (text string, err error) {
		resp, err := s.client.Get("http://" + s.log.find(t, "debug listening")["addr"].(string) + path)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if resp.StatusCode != 200 {
			t.Errorf("%s on the debug address: status %d, want 200", path, resp.StatusCode)
		}
		return string(body), err
	}
	_, id := s.register(newEmail())
	s.want(200, id)
	for _, path := range []string{"/debug/pprof/", "/debug/pprof/cmdline", "/debug/vars"} {
		s.wantStatus(404, "GET "+path, "")
		if text, err := debugGet(s, path); err != nil || text == "" {
			t.Errorf("%s on the debug address: %v", path, err)
		}
	}
	text, _ := debugGet(s, "/debug/vars")
	for _, name := range []string{`"cmdline":[`, `"memstats":{`, `"version":"`} {
		if !strings.Contains(text, name) {
			t.Errorf("/debug/vars is without %s: %s", name, text)
		}
	}
	var vars struct{ Service map[string]any }
	if err := json.Unmarshal([]byte(text), &vars); err != nil {
		t.Fatal(err)
	}
	answers, _ := vars.Service["answers_total"].(map[string]any)
	maps.Copy(vars.Service, answers)
	for name, want := range map[string]float64{
		"GET /user 200": 1, "POST /user 201": 1, "404": 3,
		"session_lookups_total": 1, "registered_total": 1, "signed_in_total": 0, "signed_out_total": 0,
		"sign_ins_refused_total": 0, "throttled_total": 0, "too_busy_total": 0,
		"session_store_errors_total": 0, "account_store_errors_total": 0,
		"bcrypts_running": 0, "sign_ins_waiting": 0, "sessions_away_seconds": 0, "accounts_away_seconds": 0,
		"redis_operations_total": 5, "redis_flushes_total": 5, "redis_retries_total": 0,
		"redis_dials_total": 1, "redis_queue": 0,
	} {
		if got, ok := vars.Service[name]; !ok || got != want {
			t.Errorf("%s is %v (%t), want %v", name, got, ok, want)
		}
	}
	s.stop()
	if text, err := debugGet(s, "/debug/vars"); err == nil {
		t.Errorf("after the end: %s", text)
	}
	if _, err := debugGet(second, "/debug/vars"); err != nil {
		t.Errorf("after the other's end: %v", err)
	}
	const warning = "DEBUG_ADDR is not a loopback address: whoever reaches it can profile this process"
	if len(s.log.lines(warning)) > 0 {
		t.Error("warns of a loopback address")
	}
	start(t, "DEBUG_ADDR=0.0.0.0:0").log.find(t, warning)
}

// ---------------------------------------------------------------------------------------------------
// Limits and security: what is counted.

func clientAt(addr string) client { return client{addr: netip.MustParseAddr(addr), named: true} }

// takeSlot takes a slot for bcrypt, and returns what gives it back.
func takeSlot(t testing.TB, s *server) (release func()) {
	t.Helper()
	try := s.gate.newTry(netip.Prefix{})
	if err := try.acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	return try.release
}

// wantLoad checks how many bcrypts run and how many tries wait.
func wantLoad(t testing.TB, s *server, running, waiting int) {
	t.Helper()
	m := s.metrics()
	if m["bcrypts_running"] != running || m["sign_ins_waiting"] != waiting {
		t.Errorf("%v bcrypts run and %v wait, want %d and %d",
			m["bcrypts_running"], m["sign_ins_waiting"], running, waiting)
	}
}

// tries are sign-ins or registrations one after the other. In client and email # is the number of the try.
type tries struct {
	after                          time.Duration // that passes before
	client, route, email, password string        // route "": signInRoute; password "": a wrong one
	n, admitted                    int           // how many there are, and how many are not 429
	status                         int           // of those that are admitted; 0: 401
}

func TestEachLimitInVirtualTime(t *testing.T) {
	t.Parallel()
	const ada, one, far, away = adaEmail, oneAddr, "203.0.113.#", "192.0.2.#"
	const second, minute = time.Second, time.Minute
	for _, tt := range []struct {
		promise string
		steps   []tries
	}{
		{"one email from one network: 10, then one a minute", []tries{
			{n: 13, client: one, email: ada, admitted: 10},
			{n: 1, client: one, email: ada, password: password},
			{n: 1, client: one, email: " ADA@Example.com"},
			{n: 1, client: one, email: "#@example.com", admitted: 1},
			{n: 1, client: far, email: ada, admitted: 1},
			{after: minute - second, n: 1, client: one, email: ada},
			{after: second, n: 2, client: one, email: ada, admitted: 1},
			{after: time.Hour, n: 11, client: one, email: ada, admitted: 10},
		}},
		{"also for an email that nobody has, and in all its forms", []tries{
			{n: 7, client: one, email: " Nobody@example.COM", admitted: 7},
			{n: 4, client: one, email: "NOBODY@example.com\t", admitted: 3},
			{n: 10, client: one, email: "KIM@example.com", admitted: 10},
			{n: 1, client: one, email: "\u212Aim@example.com", admitted: 1}, // the Kelvin sign is no k
			{n: 1, client: one, email: "kim@example.com"},
		}},
		{"an IPv6 /64 is one client", []tries{
			{n: 11, client: "2001:db8:0:1::#", email: ada, admitted: 10},
			{n: 11, client: "2001:db8:0:2:#::1", email: ada, admitted: 10},
			{n: 1, client: "::ffff:" + one, email: ada, admitted: 1},
			{n: 10, client: one, email: ada, admitted: 9},
		}},
		{"behind a NAT64 each IPv4 address is one client", []tries{
			{n: 10, client: "64:ff9b::" + one, email: ada, admitted: 10},
			{n: 1, client: "64:ff9b::203.0.113.9", email: ada, admitted: 1},
			{n: 1, client: "64:ff9b:1::" + one, email: ada, admitted: 1},
			{n: 1, client: one, email: ada},
		}},
		{"a success clears the first count, and not the third", append(slices.Repeat([]tries{
			{n: 9, client: one, email: ada, admitted: 9},
			{n: 1, client: one, email: ada, password: password, admitted: 1, status: 200},
		}, 11), tries{n: 2, client: one, email: ada, admitted: 1})},
		{"one email from everywhere: 100, then ten a minute, but not where it has signed in", []tries{
			{n: 1, client: one, email: " ADA@example.com ", password: password, admitted: 1, status: 200},
			{n: 99, client: far, email: ada, admitted: 99},
			{n: 1, client: one, email: ada, password: password, admitted: 1, status: 200}, // clears not this
			{n: 3, client: away, email: ada, admitted: 1},
			{n: 1, client: away, email: ada, password: password},
			{n: 11, client: one, email: ada, admitted: 10},
			{after: minute, n: 13, client: away, email: ada, admitted: 10},
			{n: 1, client: one, route: registerRoute, email: " New@X.com", password: password, admitted: 1,
				status: 201},
			{n: 101, client: far, email: "new@x.com", admitted: 100},
			{n: 1, client: one, email: "new@x.com", password: password, admitted: 1, status: 200},
			{n: 1, client: away, email: "new@x.com", password: password},
		}},
		{"one network: 100 failures and registrations, then ten a minute", []tries{
			{n: 90, client: one, email: "#@example.com", admitted: 90},
			{n: 3, client: one, email: ada, password: password, admitted: 3, status: 200},
			{n: 5, client: one, route: registerRoute, email: "#@x.com", password: password, admitted: 5,
				status: 201},
			{n: 20, client: one, route: registerRoute, email: "#@x.com", password: "x", admitted: 20,
				status: 400},
			{n: 20, client: one, email: "", admitted: 20, status: 400},
			{n: 7, client: one, route: registerRoute, email: ada, password: password, admitted: 5,
				status: 409},
			{n: 1, client: one, email: ada, password: password},
			{n: 1, client: far, email: ada, password: password, admitted: 1, status: 200},
			{after: minute, n: 12, client: one, email: "#@example.com", admitted: 10},
		}},
		{"private clients of a proxy, public peers, and private peers, spared the third limit", []tries{
			{n: 102, client: "10.1.2.3", email: "#@example.com", admitted: 100},
			{n: 102, client: "peer 203.0.113.9", email: "#@example.com", admitted: 100},
			{n: 101, client: "peer 10.1.2.4", email: "#@example.com", admitted: 101},
			{n: 101, client: "peer ::1", email: "#@example.com", admitted: 101},
			{n: 11, client: "peer 10.1.2.4", email: ada, admitted: 10},
		}},
		{"an email that nobody has is no account's, not even one that is the account's id", []tries{
			{n: 101, client: far, email: adaID, admitted: 100},
			{n: 101, client: far, email: "id " + adaID, admitted: 100},
			{n: 1, client: one, email: ada, password: password, admitted: 1, status: 200},
			{n: 1, client: far, email: adaID},
		}},
	} {
		inVirtualTime(t, tt.promise, func(t *testing.T) { newUnit(t, unitConfig{}).wantLimit(tt.steps) })
	}
}

func (s *unit) wantLimit(steps []tries) {
	s.addAccount(adaEmail, bcrypt.MinCost)
	s.exec(`UPDATE users SET id = ?`, adaID)
	number := 0
	compared := 0
	try := func(step tries) *reply {
		number++
		route := cmp.Or(step.route, signInRoute)
		email := numbered(step.email, number)
		a := s.request(s.Context(), numbered(step.client, number), route, email,
			cmp.Or(step.password, wrongPassword))
		if a.status == 200 || a.status == 401 {
			compared++
		}
		return a
	}
	for i, step := range steps {
		time.Sleep(step.after)
		for n := range step.n {
			want := cmp.Or(step.status, 401)
			if n >= step.admitted {
				want = 429
			}
			if a := try(step); a.status != want {
				s.Fatalf("step %d, try %d of %+v: status %d, want %d", i+1, n+1, step, a.status, want)
			}
		}
	}
	step := steps[len(steps)-1] // has ended with 429, whose Retry-After tells when the next try counts
	time.Sleep(time.Second / 2)
	seconds, _ := strconv.Atoi(try(step).header.Get("Retry-After"))
	time.Sleep(time.Duration(seconds-1) * time.Second)
	early := try(step).status
	time.Sleep(time.Second)
	if inTime := try(step).status; early != 429 || inTime == 429 || seconds > 60 {
		s.Errorf("Retry-After %d: status %d a second before, %d then", seconds, early, inTime)
	}
	if n := int(s.bcrypt.comparisons.Load()); n != compared {
		s.Errorf("%d comparisons for %d sign-ins: one that is refused costs none", n, compared)
	}
}

// Tries in flight may fail together. So they may exceed a limit, by fewer than there are slots.
func TestTriesAtTheSameMoment(t *testing.T) {
	t.Parallel()
	const guess, minute, perMinute10 = wrongPassword, time.Minute, time.Minute / 10
	for _, tt := range []struct {
		name                   string
		slots                  int
		failures               int    // before
		of                     string // the email that they were of
		n                      int    // tries at once
		route, email, password string
		least                  int // how many of them are not 429; at most slots-1 more
		statuses               []int
		interval               time.Duration // by which each one more makes the next try wait
	}{
		{"right passwords", 2, 0, "", 64, signInRoute, adaEmail, password, 64, []int{200}, 0},
		{"6 after 9 failures", 64, 9, adaEmail, 6, signInRoute, adaEmail, password, 6, []int{200}, 0},
		{"64 after 9 failures", 2, 9, adaEmail, 64, signInRoute, adaEmail, password, 64, []int{200}, 0},
		{"16 guesses", 2, 0, "", 16, signInRoute, adaEmail, guess, 10, []int{401}, minute},
		{"64 guesses in 20 slots", 20, 0, "", 64, signInRoute, adaEmail, guess, 10, []int{401}, minute},
		{"new emails", 2, 90, "#@x.com", 64, signInRoute, "#@y.com", guess, 10, []int{401}, perMinute10},
		{"new accounts", 2, 90, "#@x.com", 64, registerRoute, "#@y.com", password, 10, []int{201},
			perMinute10},
		{"one account", 2, 98, "#@x.com", 64, registerRoute, "x@y.com", password, 2, []int{201, 409},
			perMinute10},
	} {
		inVirtualTime(t, tt.name, func(t *testing.T) {
			s := newUnit(t, unitConfig{bcryptSlots: tt.slots})
			s.addAccount(adaEmail, bcrypt.MinCost)
			s.failures(tt.failures, tt.of)
			const bcryptTakes = 125 * time.Millisecond
			s.bcrypt.before = func(string) { time.Sleep(bcryptTakes) }
			got := make([]int, tt.n)
			begin := time.Now()
			together(tt.n, func(i int) {
				got[i] = s.request(s.Context(), oneAddr, tt.route, numbered(tt.email, i), tt.password).status
			})
			took := time.Since(begin)
			got = slices.DeleteFunc(got, func(status int) bool { return status == 429 })
			beyond := len(got) - tt.least
			if beyond < 0 || beyond >= tt.slots {
				s.Errorf("%d are admitted, want %d, or %d more at most", len(got), tt.least, tt.slots-1)
			}
			slices.Sort(got)
			if statuses := slices.Compact(got); !slices.Equal(statuses, tt.statuses) {
				s.Errorf("statuses %v, want %v and 429", statuses, tt.statuses)
			}
			if rounds := (tt.n + tt.slots - 1) / tt.slots; took > time.Duration(rounds)*bcryptTakes {
				s.Errorf("took %v, although all slots are free", took)
			}
			wantLoad(s, s.server, 0, 0)
			next := s.request(s.Context(), oneAddr, tt.route, numbered(tt.email, tt.n), tt.password)
			seconds, _ := strconv.Atoi(next.header.Get("Retry-After"))
			least := time.Duration(beyond) * tt.interval
			if wait := time.Duration(seconds) * time.Second; wait < least || wait > least+tt.interval {
				s.Errorf("Retry-After %v with %d beyond the limit, want %v to %v",
					wait, beyond, least, least+tt.interval)
			}
		})
	}
}

// A 503 counts against no limit, unless it has cost a bcrypt.
func TestWhatA503Counts(t *testing.T) {
	t.Parallel()
	busy := func(s *unit) { takeSlot(s, s.server) }
	noSessions := func(s *unit) { s.trouble = failing("Create", errUnavailable) }
	slowSessions := func(s *unit) {
		s.trouble = func(string) error { time.Sleep(storeTimeout); return nil }
	}
	for _, tt := range []struct {
		name, route string
		spoil       func(s *unit)
		patience    time.Duration // of the client
		store       string        // that is in trouble
		answers     int           // that are not 429, of 120
	}{
		{"sign-in too busy", signInRoute, busy, time.Hour, "", 120},
		{"sign-in whose client leaves", signInRoute, busy, time.Second, "", 120},
		{"sign-in without accounts", signInRoute, (*unit).breakFile, time.Hour, "accounts", 120},
		{"registration too busy", registerRoute, busy, time.Hour, "", 120},
		{"registration whose client leaves", registerRoute, busy, time.Second, "", 120},
		{"registration without accounts", registerRoute, (*unit).breakFile, time.Hour, "accounts", 100},
		{"health check without accounts", "GET /healthz", (*unit).breakFile, time.Hour, "accounts", 120},
		{"registration without sessions", registerRoute, noSessions, time.Hour, "sessions", 100},
		{"registration that comes too late to the accounts", registerRoute, slowSessions, time.Hour, "", 100},
	} {
		inVirtualTime(t, tt.name, func(t *testing.T) {
			s := newUnit(t, unitConfig{})
			s.expectErrors()
			tt.spoil(s)
			var unavailable, throttled atomic.Int64
			for range 2 { // 60 fit into the queue
				together(60, func(int) {
					ctx, cancel := context.WithCancel(s.Context())
					time.AfterFunc(tt.patience, cancel)
					switch a := s.request(ctx, oneAddr, tt.route, adaEmail, password); a.status {
					case 503:
						unavailable.Add(1)
					case 429:
						throttled.Add(1)
					}
				})
			}
			n := unavailable.Load()
			if n+throttled.Load() != 120 || n < int64(tt.answers) || n > int64(tt.answers)+1 {
				s.Errorf("%s: %d times 503, %d times 429, want %d times 503", tt.route, n, throttled.Load(),
					tt.answers)
			}
			if tt.store == "" {
				return
			}
			s.server.drain(s.Context())
			line := s.log.find(s, "store out of reach")
			counted := s.server.metrics()[strings.TrimSuffix(tt.store, "s")+"_store_errors_total"]
			if line["store"] != tt.store || counted != n {
				s.Errorf("log line %v and %v errors, want %d of %s", line, counted, n, tt.store)
			}
		})
	}
}

func TestGuessingOverHTTPLeavesOpenSessions(t *testing.T) {
	t.Parallel()
	s := start(t, trustLocal)
	user := s.addAccount(newEmail(), bcrypt.MinCost)
	open := s.signIn(user.Email, from(oneAddr)) // as may be behind one address
	for i := range 12 {
		status := s.status("POST /user/signin", credentials(user.Email, wrongPassword), from(oneAddr))
		if want := []int{401, 429}[i/10]; status != want {
			t.Errorf("guess %d: status %d, want %d", i+1, status, want)
		}
	}
	s.want(200, open)
	s.stop() // logs what it has kept back
	line := s.log.find(t, "sign-in refused")
	throttled := eventsOf(s.log.lines("throttled"))
	if throttled != 2 || line["client"] != oneAddr || line["user"] != user.ID {
		t.Errorf("%v events throttled, want 2; log line %v, want user and client", throttled, line)
	}
}

func TestTheGateRemembersLittle(t *testing.T) { // not in parallel: it measures the heap
	heap := func() int {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int(m.HeapAlloc)
	}
	synctest.Test(t, func(t *testing.T) {
		before := heap()
		g := newGate(1)
		guess := func(i int) error { // of an account, from a network of its own
			addr := fmt.Sprintf("20.%d.%d.%d", i>>16, i>>8&255, i&255)
			try := g.newSignIn(strconv.Itoa(i), clientAt(addr))
			err := try.acquire(t.Context())
			if err == nil {
				try.count()
				try.release()
			}
			return err
		}
		for i := range 3 * maxKnown {
			g.remember(strconv.Itoa(i), clientAt(oneAddr))
		}
		if grown := heap() - before; grown > 10<<20 {
			t.Errorf("%d known pairs take %d kB", 3*maxKnown, grown>>10)
		}
		before = heap()
		const victim = 1 << 23
		for range 10 {
			guess(victim)
		}
		const perSecond = 40 // as two cores do at the lowest cost
		for i := range 20 * 60 * perSecond {
			if time.Sleep(time.Second / perSecond); i == 59*perSecond {
				if err := guess(victim); err == nil {
					t.Error("a full count was forgotten among many")
				}
			}
			guess(i)
		}
		if grown := heap() - before; grown > 2<<20 {
			t.Errorf("the counts take %d kB after 20 minutes of %d guesses a second", grown>>10, perSecond)
		}
		runtime.KeepAlive(g)
	})
}

// ---------------------------------------------------------------------------------------------------
// Limits and security: the queue for bcrypt.

func TestTheQueueForBcryptIsBounded(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, "2 slots", func(t *testing.T) {
		s := newUnit(t, unitConfig{bcryptSlots: 2})
		const atOnce, left, inTime = "Retry-After 10, after 0s", "Retry-After 2, after 0s",
			"Retry-After 10, after 5s"
		slots := []func(){takeSlot(s, s.server), takeSlot(s, s.server)}
		var mu sync.Mutex
		refused := map[string]int{}
		ask := func(ctx context.Context, n int, networks ...string) {
			for i := range n * len(networks) {
				go func() {
					begin := time.Now()
					route := []string{signInRoute, registerRoute}[i%2]
					a := s.request(ctx, networks[i%len(networks)]+"::1", route, newEmail(), wrongPassword)
					mu.Lock()
					defer mu.Unlock()
					what := fmt.Sprintf("Retry-After %s, after %v", a.header.Get("Retry-After"),
						time.Since(begin))
					if n == 1 {
						what += ", the fifth"
					}
					refused[what]++
				}()
			}
		}
		ctx, hangUp := context.WithCancel(s.Context())
		others := []string{"2:2:2:2", "3:3:3:3", "4:4:4:4"}
		fifth := func() { ask(s.Context(), 1, "5:5:5:5") }
		for _, tt := range []struct {
			what    string
			do      func()
			waiting int
			refused map[string]int
		}{
			{"70 of one network", func() { ask(ctx, 70, "1:1:1:1") }, 64, map[string]int{atOnce: 6}},
			{"70 of each of three others", func() { ask(s.Context(), 70, others...) }, 256,
				map[string]int{atOnce: 24}},
			{"a fifth, for whom the end of a line goes", fifth, 256, map[string]int{atOnce: 25}},
			{"the first one's clients leave", hangUp, 192, map[string]int{atOnce: 25, left: 64}},
			{"the fifth again", fifth, 193, map[string]int{atOnce: 25, left: 64}},
			{"patience is over", func() { time.Sleep(queueTimeout) }, 0,
				map[string]int{atOnce: 25, left: 64, inTime: 191, inTime + ", the fifth": 2}},
		} {
			tt.do()
			synctest.Wait()
			wantLoad(s, s.server, 2, tt.waiting)
			mu.Lock()
			if !maps.Equal(refused, tt.refused) {
				s.Errorf("%s: refused %v, want %v", tt.what, refused, tt.refused)
			}
			mu.Unlock()
		}
		for _, leave := range slots {
			leave()
		}
		wantLoad(s, s.server, 0, 0)
		if n := s.bcrypt.comparisons.Load(); n > 0 {
			s.Errorf("%d comparisons for those who left or gave up", n)
		}
	})
}

// Attackers whose lines are full cost another network one bcrypt each.
func TestNoNetworkWaitsForAnothersLine(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		route                  string
		slots, attackers, each int
	}{
		{route: signInRoute, slots: 1, attackers: 1, each: maxLine},
		{route: registerRoute, slots: 1, attackers: 1, each: maxLine},
		{route: signInRoute, slots: 2, attackers: 3, each: maxLine},
		{route: signInRoute, slots: 4, attackers: 20, each: 12},
		{route: "a hash stored anew", slots: 1, attackers: 1, each: maxLine},
	} {
		inVirtualTime(t, fmt.Sprintf("%+v", tt), func(t *testing.T) {
			s := newUnit(t, unitConfig{bcryptSlots: tt.slots})
			s.addAccount(adaEmail, bcrypt.MinCost)
			ahead := 0 // of the victim
			s.bcrypt.before = func(text string) {
				if text == password {
					ahead = tt.attackers*tt.each - s.server.metrics()["sign_ins_waiting"].(int)
				}
				time.Sleep(250 * time.Millisecond)
			}
			var slots []func()
			for range tt.slots {
				slots = append(slots, takeSlot(s, s.server))
			}
			var asked sync.WaitGroup
			for i := range tt.attackers * tt.each {
				client := fmt.Sprintf("203.0.113.%d", i%tt.attackers)
				asked.Go(func() {
					if strings.HasPrefix(tt.route, "POST") {
						s.request(s.Context(), client, tt.route, newEmail(), wrongPassword)
					} else {
						s.server.hashPassword(s.Context(), s.server.gate.newTry(netip.Prefix{}), password)
					}
				})
			}
			synctest.Wait()
			asked.Go(func() { s.wantSignIn(200, adaEmail, password) })
			synctest.Wait()
			for _, leave := range slots {
				leave()
			}
			asked.Wait()
			if ahead > tt.attackers+tt.slots {
				s.Errorf("%d of the attackers' came before the victim, want one of each", ahead)
			}
		})
	}
}

func TestEverNewNetworksPassNobodyBy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(1)
		var order []string
		var asked sync.WaitGroup
		var ask func(addr string)
		ask = func(addr string) {
			asked.Go(func() {
				try := g.newRegistration(clientAt(addr))
				if try.acquire(t.Context()) != nil {
					return
				}
				order = append(order, addr)
				if n := len(order); n < 50 {
					ask(fmt.Sprintf("203.0.113.%d", n))
				}
				time.Sleep(time.Second) // in which that one queues up
				try.release()
			})
		}
		for range 5 {
			ask(oneAddr)
			synctest.Wait()
		}
		asked.Wait()
		if slices.Contains(order[15:], oneAddr) {
			t.Errorf("after 15 some of the first network's five still wait: %v", order)
		}
	})
}

func TestARegistrationThatWaitsForAStoreHoldsUpNoBcryptAndIsCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newUnit(t, unitConfig{})
		goOn := make(chan struct{})
		s.trouble = func(string) error { <-goOn; return nil }
		s.failures(98, "#@example.com")
		var registered sync.WaitGroup
		registered.Go(func() { s.request(s.Context(), oneAddr, registerRoute, newEmail(), password) })
		synctest.Wait()
		wantLoad(s, s.server, 0, 0)
		s.wantSignIn(401, newEmail(), wrongPassword)
		s.wantSignIn(429, newEmail(), wrongPassword)
		close(goOn)
		registered.Wait()
	})
}

func TestASignInWhoseClientLeavesCostsNoBcrypt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newUnit(t, unitConfig{})
		goOn := make(chan struct{})
		s.bcrypt.before = func(string) { <-goOn }
		dial := s.listen()
		first, second := dial(), dial()
		signIn := httpText("POST /user/signin", credentials("nobody@example.com", password))
		for _, conn := range []net.Conn{first, second} { // one runs, one waits
			io.WriteString(conn, signIn)
			synctest.Wait()
		}
		second.Close()
		synctest.Wait()
		close(goOn)
		a := readHTTP(s, "POST /user/signin", bufio.NewReader(first))
		synctest.Wait() // a second comparison would be over
		if n := s.bcrypt.comparisons.Load(); a.status != 401 || n != 1 {
			s.Errorf("status %d, %d comparisons, want 401 and the one of the client that stayed", a.status, n)
		}
	})
}

func TestNoSlotLeaksWhereClientsLeave(t *testing.T) {
	t.Parallel()
	g := newGate(3)
	together(24, func(worker int) {
		for range rounds(1000, 100_000) {
			try := g.newRegistration(clientAt(fmt.Sprintf("198.51.100.%d", worker%7)))
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(rand.N(20*time.Microsecond), cancel)
			if try.acquire(ctx) == nil {
				if running, _ := g.load(); running > 3 {
					t.Errorf("%d bcrypts at a time, want at most 3", running)
				}
				<-ctx.Done()
				try.release()
			}
		}
	})
	if running, waiting := g.load(); running != 0 || waiting != 0 {
		t.Errorf("%d bcrypts run and %d wait, want none", running, waiting)
	}
}

// ---------------------------------------------------------------------------------------------------
// Limits and security: passwords.

// Neither work nor words tell whether an account exists, nor what its hash is.
func TestEveryWrongPasswordCostsTheSame(t *testing.T) {
	t.Parallel()
	const cost = 7
	s := newUnit(t, unitConfig{bcryptCost: cost})
	right := hashOf(t, password, bcrypt.MinCost)
	empty := hashOf(t, "", bcrypt.MinCost)
	nuls := strings.Repeat("\x00", 72) // all that bcrypt reads of a password
	all := []string{wrongPassword, "x", strings.Repeat("x", 92)}
	type stored struct {
		hash   string
		given  []string
		status int
		warns  bool
	}
	cases := []stored{
		{hash: "no account", given: all, status: 401},
		{hash: empty, given: []string{"", "\x00", nuls + "x"}, status: 400},
		{hash: empty, given: []string{nuls[1:] + "x"}, status: 401},
	}
	for weaker := bcrypt.MinCost; weaker <= cost; weaker++ {
		cases = append(cases, stored{hash: hashOf(t, password, weaker), given: all, status: 401})
	}
	for _, hash := range []string{
		"", "plain", password, "$argon2id$v=19$m=65536,t=3,p=4$c2FsdA$aGFzaA", right + "x", right[:59],
		"$2x$" + right[4:], "$1a$" + right[4:], "$2$" + right[4:], right[:28] + "\n" + right[29:],
		"$2a$03$" + right[7:], "$2a$16$" + right[7:], "$2a$31$" + right[7:], "$2a$99$" + right[7:],
	} {
		given := append(all, password, hash+"x")
		cases = append(cases, stored{hash: hash, given: given, status: 401, warns: true})
	}
	warned := 0.0
	const body = `{"title":"Unauthorized","status":401,"detail":"The email or the password is wrong."}`
	for i, tt := range cases {
		email := newEmail()
		if tt.hash != "no account" {
			email = s.addAccount(email, bcrypt.MinCost).Email
			s.exec(`UPDATE users SET password = ? WHERE email = ?`, tt.hash, email)
		}
		for _, text := range tt.given {
			before := s.bcrypt.rounds.Load()
			a := s.request(t.Context(), fmt.Sprintf("203.0.113.%d", i), signInRoute, email, text)
			spent := s.bcrypt.rounds.Load() - before
			if a.status != tt.status || a.status == 401 && (a.body != body || spent != 1<<cost) {
				t.Errorf("%q, password %.9q: status %d, %d rounds of bcrypt, want %d and %d: %s",
					tt.hash, text, a.status, spent, tt.status, 1<<cost, a.body)
			}
			if a.status == 400 && !strings.Contains(a.body, `"errors":{"password":`) {
				t.Errorf("%q, password %.9q: %s, want errors of the password", tt.hash, text, a.body)
			}
			if tt.warns {
				warned++
			}
		}
	}
	s.server.limited.flush()
	lines := s.log.lines("password hash not usable")
	last := query[string](s.service, `SELECT id FROM users WHERE password LIKE '$2a$99$%'`)
	latest := lines[len(lines)-1]
	if eventsOf(lines) != warned || latest["user"] != last || latest["level"] != "WARN" {
		t.Errorf("%v, want warnings of %v sign-ins, the last of user %s", lines, warned, last)
	}
}

// A flood of registrations runs no faster than bcrypt does, whatever comes of them.
func TestATakenEmailCostsWhatAFreeOneDoes(t *testing.T) {
	t.Parallel()
	s := newUnit(t, unitConfig{bcryptCost: 10})
	fastest := func(status int, email func() string) time.Duration {
		best := time.Hour
		for range 3 {
			begin := time.Now()
			a := s.request(t.Context(), oneAddr, registerRoute, email(), password)
			best = min(best, time.Since(begin))
			if a.status != status {
				t.Fatalf("%s: status %d, want %d", registerRoute, a.status, status)
			}
		}
		return best
	}
	free := fastest(201, newEmail)
	s.addAccount(adaEmail, bcrypt.MinCost)
	taken := fastest(409, func() string { return adaEmail })
	if taken < free/20 { // a busy machine slows either; without bcrypt it would be some hundredth
		t.Errorf("409 takes %v, 201 takes %v, want the same", taken, free)
	}
}

func TestWeakHashesAreStoredAnew(t *testing.T) {
	t.Parallel()
	s := newUnit(t, unitConfig{bcryptCost: 6}) // its sessions live elsewhere than its accounts
	stored := func(email string) string {
		s.server.drain(t.Context())
		return query[string](s.service, `SELECT password FROM users WHERE email = ?`, email)
	}
	for _, tt := range []struct {
		prefix, password string
		cost             int
		anew             bool
	}{
		{"$2a$", password, 4, true},
		{"$2b$", password, 5, true},
		{"$2y$", "short", 4, true},
		{"$2a$", strings.Repeat("x", 72) + "20 more bytes of it.", 4, true},
		{"$2b$", password, 6, false},
		{"$2y$", password, 7, false},
	} {
		email := s.addAccount(newEmail(), bcrypt.MinCost).Email
		old := tt.prefix + hashOf(t, firstBytes(tt.password), tt.cost)[len(tt.prefix):]
		s.exec(`UPDATE users SET password = ? WHERE email = ?`, old, email)
		s.wantSignIn(200, email, tt.password)
		hash := stored(email)
		if anew := hash != old; anew != tt.anew || anew && hash[4:6] != "06" {
			t.Errorf("%s became %s, want it stored anew at cost 6: %v", old, hash, tt.anew)
		}
		s.wantSignIn(200, email, tt.password)
	}

	// A lock on the file is not waited for: not by the sign-in, and not in a slot.
	email := s.addAccount(newEmail(), bcrypt.MinCost).Email
	other := openSQL(t, s.dbPath)
	defer other.Close()
	lock, err := other.Begin()
	if err != nil {
		t.Fatal(err)
	}
	lock.Exec(`DELETE FROM users WHERE email = ''`)
	const trouble = "password hash not upgraded" // once SQLite gives up on the lock
	s.wantSignIn(200, email, password)
	s.wantSignIn(200, email, password)
	if len(s.log.lines(trouble)) > 0 {
		t.Error("a sign-in waited for the lock on the file")
	}
	s.log.find(t, trouble)
	lock.Rollback()
	s.wantSignIn(200, email, password)
	if hash := stored(email); hash[4:6] != "06" {
		t.Errorf("the next sign-in left %s, want cost 6", hash)
	}
}

func TestAPasswordThatIsNullOpensNothing(t *testing.T) {
	t.Parallel()
	file := originalFile(t, strings.ReplaceAll(originalDDL, `TEXT NOT NULL,`, `TEXT,`))
	file.exec(`INSERT INTO users (id, email, createdAt, updateAt) VALUES ('7', 'null@example.com', 0, 0)`)
	s := start(t, "DB_PATH="+file.dbPath)
	s.wantStatus(401, "POST /user/signin", credentials("null@example.com", password))
	if user := s.log.find(t, "password hash not usable")["user"]; user != "7" {
		t.Errorf("the log names %v, want 7", user)
	}
}

// ---------------------------------------------------------------------------------------------------
// Speed: benchmarks. Each reports ratios to baselines that are measured in the same run, turn by turn.

// speed is how often a second work was done, and the 99th percentile of the seconds that it took.
type speed struct{ rate, p99 float64 }

// turns returns a function in which workers do their work n times in all.
func turns(b *testing.B, workers, n int, do func(worker int) error) func() speed {
	return func() speed {
		times := make([][]float64, workers)
		var started atomic.Int64
		begin := time.Now()
		together(workers, func(worker int) {
			for started.Add(1) <= int64(n) {
				begin := time.Now()
				if err := do(worker); err != nil {
					b.Error(err)
					return
				}
				times[worker] = append(times[worker], time.Since(begin).Seconds())
			}
		})
		rate := float64(n) / time.Since(begin).Seconds()
		if b.Failed() {
			b.FailNow()
		}
		return speed{rate: rate, p99: quantile(slices.Concat(times...), 0.99)}
	}
}

func quantile(values []float64, q float64) float64 {
	slices.Sort(values)
	return values[int(q*float64(len(values)))]
}

// compare gives subject and baselines their turns. It reports the medians of the subject's rate and of its
// ratios to each baseline.
func compare(b *testing.B, subject func() speed, baselines map[string]func() speed) {
	b.Helper()
	metrics := map[string][]float64{}
	for b.Loop() {
		s := subject()
		metrics["ops/s"] = append(metrics["ops/s"], s.rate)
		for name, baseline := range baselines {
			base := baseline()
			metrics["rate/"+name] = append(metrics["rate/"+name], s.rate/base.rate)
			metrics["p99/"+name] = append(metrics["p99/"+name], s.p99/base.p99)
		}
	}
	b.ReportMetric(0, "ns/op") // would be of all turns together
	for metric, values := range metrics {
		b.ReportMetric(quantile(values, 0.5), metric)
	}
}

// startTuned is start with the runtime as the program tunes it.
func startTuned(b *testing.B, vars ...string) *service {
	b.Helper()
	threads := runtime.GOMAXPROCS(0)
	percent := debug.SetGCPercent(100)
	b.Cleanup(func() {
		runtime.GOMAXPROCS(threads)
		debug.SetGCPercent(percent)
	})
	s := start(b, vars...) // first, as it counts the cores for bcrypt
	tuneRuntime(func(string) string { return "" })
	return s
}

// lookups asks a server whose session id is, each worker on a connection of its own.
func lookups(b *testing.B, workers int, url, id string) func(worker int) error {
	b.Helper()
	addr := strings.TrimPrefix(url, "http://")
	request := []byte("GET /user HTTP/1.1\r\nHost: " + addr + "\r\n" + cookie(id) + "\r\n\r\n")
	conns := make([]net.Conn, workers)
	do := func(worker int) error {
		if _, err := conns[worker].Write(request); err != nil {
			return err
		}
		var buffer [1024]byte
		n, err := conns[worker].Read(buffer[:]) // an answer comes whole
		answer := string(buffer[:n])
		if !strings.HasPrefix(answer, "HTTP/1.1 200") || !strings.HasSuffix(answer, "}") {
			return fmt.Errorf("GET /user: %q, %v", answer, err)
		}
		return nil
	}
	for worker := range conns {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { conn.Close() })
		conns[worker] = conn
		if err := do(worker); err != nil { // at once: a connection without a request is cut after a while
			b.Fatal(err)
		}
	}
	return do
}

// pooledSessions reads sessions in the usual way, each on a connection from a pool.
type pooledSessions struct {
	SessionStore
	pool redis.Pool
}

func (s *pooledSessions) Get(_ context.Context, id string) (User, error) {
	c := s.pool.Get()
	defer c.Close()
	hash, err := redis.StringMap(c.Do("HGETALL", sessionKey(id)))
	user := User{ID: hash["id"], Name: hash["name"], Email: hash["email"]}
	user.CreatedAt, user.UpdatedAt = userTimes(parseSessionTime, hash["createdAt"], hash["updatedAt"])
	return user, err
}

// startPooled serves what the service does, but with pooledSessions.
func startPooled(b *testing.B, redisURL string) (url string) {
	dial := func() (redis.Conn, error) { return redis.DialURL(redisURL) }
	sessions := &pooledSessions{pool: redis.Pool{MaxIdle: 64, Dial: dial}}
	b.Cleanup(func() { sessions.pool.Close() })
	s := newUnit(b, unitConfig{sessions: sessions}).server
	hs := httptest.NewUnstartedServer(s)
	hs.Listener = &listener{Listener: hs.Listener, server: s}
	hs.Start()
	b.Cleanup(hs.Close)
	return hs.URL
}

// startBare serves an answer without any work for it.
func startBare(b *testing.B, answer *reply) (url string) {
	hs := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		maps.Copy(w.Header(), answer.header)
		io.WriteString(w, answer.body)
	}))
	b.Cleanup(hs.Close)
	return hs.URL
}

func BenchmarkUser(b *testing.B) {
	for _, bm := range []struct {
		name    string
		redis   bool
		delay   time.Duration // of Redis's replies
		workers int
	}{
		{name: "redis", redis: true, workers: 64},
		{name: "redis+5ms/two", redis: true, delay: 5 * time.Millisecond, workers: 2},
		{name: "redis+5ms/64", redis: true, delay: 5 * time.Millisecond, workers: 64},
		{name: "sqlite", workers: 64},
	} {
		b.Run(bm.name, func(b *testing.B) {
			url := ""
			if bm.redis {
				url = redisURL(b)
			}
			if bm.delay > 0 {
				url = startProxy(b, strings.TrimPrefix(url, "redis://"), bm.delay).url()
			}
			s := startTuned(b, "REDIS_URL="+url)
			_, id := s.register(newEmail())
			turnsAt := func(url string) func() speed {
				return turns(b, bm.workers, 32*bm.workers, lookups(b, bm.workers, url, id))
			}
			baselines := map[string]func() speed{}
			if bm.delay == 0 {
				baselines["bare"] = turnsAt(startBare(b, s.want(http.StatusOK, id)))
			}
			if bm.redis {
				baselines["pooled"] = turnsAt(startPooled(b, url))
			}
			compare(b, turnsAt(s.url), baselines)
		})
	}
}

// signInFrom signs in from the i-th of many networks, which no limit counts together.
func signInFrom(s *service, email string, i int) int {
	client := from(fmt.Sprintf("203.0.%d.113", i))
	return s.status("POST /user/signin", credentials(email, password), client)
}

func BenchmarkSignIn(b *testing.B) {
	cores := runtime.GOMAXPROCS(0)
	s := startTuned(b, "REDIS_URL="+redisURL(b), "BCRYPT_COST=10", trustLocal)
	email := newEmail()
	s.addAccount(email, 10)
	hash := []byte(hashOf(b, password, 10))
	signIn := func(worker int) error {
		if status := signInFrom(s, email, worker); status != http.StatusOK {
			return fmt.Errorf("POST /user/signin: status %d, want 200", status)
		}
		return nil
	}
	compareHash := func(int) error { return bcrypt.CompareHashAndPassword(hash, []byte(password)) }
	compare(b, turns(b, cores, cores, signIn),
		map[string]func() speed{"bcrypt": turns(b, cores, cores, compareHash)})
}

// BenchmarkUserDuringSignIns shows what GET /user has to bear while 64 networks sign in without pause. Its
// baseline is measured before that begins.
func BenchmarkUserDuringSignIns(b *testing.B) {
	const workers, n = 8, 1000
	s := startTuned(b, "REDIS_URL="+redisURL(b), "BCRYPT_COST=12", trustLocal)
	email := newEmail()
	s.addAccount(email, 12)
	lookUp := lookups(b, workers, s.url, s.signIn(email))
	quiet := turns(b, workers, 20*n, lookUp)()
	var storm sync.WaitGroup
	b.Cleanup(storm.Wait)
	for i := range 64 {
		storm.Go(func() {
			for b.Context().Err() == nil { // 503 is for those that would wait too long for bcrypt
				if status := signInFrom(s, email, i); status != 200 && status != 503 {
					b.Errorf("POST /user/signin: status %d, want 200 or 503", status)
				}
			}
		})
	}
	compare(b, turns(b, workers, n, lookUp), map[string]func() speed{"quiet": func() speed { return quiet }})
}

// ---------------------------------------------------------------------------------------------------
// Moving over from the Express app, and back.

func TestEveryAccountOfTheOriginalSignsInAsItDid(t *testing.T) {
	t.Parallel()
	file := originalFile(t, originalDDL)
	accounts := []struct {
		id, email, password, prefix string // "": what is usual
		cost                        int
	}{
		{id: "usual"},
		{id: "strong", cost: 5}, {id: "stronger", cost: 6, prefix: "$2a$"},
		{id: "2a", prefix: "$2a$"}, {id: "2y", prefix: "$2y$"},
		{id: "1 character", password: "x"}, {id: "spaces", password: "      "},
		{id: "92 bytes", password: strings.Repeat("pässwörter ", 7) + "x"},
		{id: "with NUL", password: "\x00nul\x00inside"},
		{id: "umlauts", email: "ÄÖ@example.com"}, {id: "padded", email: " padded@example.com "},
		{id: "endless", email: strings.Repeat("endless", 1000)},
	}
	for i := range accounts {
		a := &accounts[i]
		a.email = cmp.Or(a.email, a.id+"@Example.com")
		a.password = cmp.Or(a.password, password)
		hash := hashOf(t, a.password[:min(len(a.password), maxPassword)], cmp.Or(a.cost, bcrypt.MinCost))
		file.exec(`INSERT INTO users VALUES (?1, 'Ünï Cödé ', ?2, ?3, ?4, ?4)`,
			a.id, a.email, cmp.Or(a.prefix, "$2b$")+hash[4:], millis)
	}
	file.exec(`INSERT INTO users VALUES ('empty', '', 'empty@example.com', ?, 0, 0)`,
		hashOf(t, "", bcrypt.MinCost))
	const rows = `SELECT group_concat(concat_ws(' ', rowid, quote(id), quote(name), quote(email),
		quote(createdAt), quote(updateAt), iif(id IN ('strong', 'stronger', 'empty'), password, '')),
		char(10)) FROM users`
	before := query[string](file, rows)
	s := start(t, "BCRYPT_COST=5", "DB_PATH="+file.dbPath)
	for range 2 { // the second time with the hash as it was upgraded
		for _, a := range accounts {
			want := userJSON(User{a.id, "Ünï Cödé ", a.email, millisTime, millisTime})
			got := s.ask("POST /user/signin", credentials(a.email, a.password))
			if got.status != 200 || got.body != want {
				t.Errorf("POST /user/signin: status %d, %s, want 200, %s", got.status, got.body, want)
			} else if got := s.want(200, got.cookie.Value); got.body != want {
				t.Errorf("GET /user of %s: %s, want %s", a.id, got.body, want)
			}
		}
		eventually(t, 30*time.Second, "all weak hashes are upgraded", func() bool {
			const weak = `SELECT count(*) FROM users WHERE password LIKE '$2_$04$%'`
			return query[int](s, weak) == 1 // of "empty"
		})
	}
	nuls := strings.Repeat("\x00", 100)
	for _, typed := range []string{"", nuls[:1], nuls[:72] + "x", nuls} {
		if a := s.ask("POST /user/signin", credentials("empty@example.com", typed)); a.status != 400 {
			t.Errorf("POST /user/signin with %q for no password: status %d, want 400", typed, a.status)
		}
	}
	if after := query[string](s, rows); after != before {
		t.Errorf("rows were rewritten:\n%s\nwant\n%s", after, before)
	}
}

func TestWhatAnEmailMeans(t *testing.T) {
	t.Parallel()
	stored := []string{"Grace@Example.com", "GRACE@example.com", "Ada@Example.com", "ada@example.com",
		" Bob@example.com", "bob@example.com", "Old@Example.com", "ÄÖ@example.com", " padded@example.com ",
		"not an address", "", "e\u0301@example.com"}
	s := start(t, "DB_PATH="+originalFile(t, originalDDL, stored...).dbPath)
	for _, tt := range []struct {
		typed    string
		account  string // that it signs in
		register int    // the status; later rows meet the accounts of earlier ones
	}{
		{"Grace@Example.com", "Grace@Example.com", 409}, // two that differ by case only
		{"GRACE@example.com", "GRACE@example.com", 409},
		{"grace@example.com", "", 409},
		{" Grace@Example.com", "Grace@Example.com", 409},
		{"ADA@EXAMPLE.COM", "", 409},
		{"\tada@example.com\n", "ada@example.com", 409}, // trimmed
		{" Bob@example.com", " Bob@example.com", 409},   // as typed before trimmed
		{"Bob@example.com", "bob@example.com", 409},
		{" BOB@example.com", "bob@example.com", 409},
		{" OLD@example.COM ", "Old@Example.com", 409},
		{"ÄÖ@Example.com", "ÄÖ@example.com", 409},
		{"äö@example.com", "", 201}, // only the case of ASCII letters is disregarded
		{"İnfo@Example.com", "", 201},
		{"info@example.com", "", 201},
		{"\u212Aelvin@example.com", "", 201}, // begins with the sign for kelvin
		{"kelvin@example.com", "", 201},
		{"\u00e9@example.com", "", 201}, // é in one code point
		{"İNFO@example.com", "İnfo@Example.com", 409},
		{" padded@example.com ", " padded@example.com ", 409},
		{" PADDED@example.com ", "", 409},
		{"padded@example.com", "", 201}, // the original does not trim
		{"not an address", "not an address", 400},
		{"not%address", "", 400},
		{"", "", 400},
	} {
		a := s.ask("POST /user/signin", credentials(tt.typed, password))
		var signedIn User
		json.Unmarshal([]byte(a.body), &signedIn)
		if signedIn.Email != tt.account || (a.status == 200) != (tt.account != "") {
			t.Errorf("signing %q in: status %d, %q, want %q", tt.typed, a.status, signedIn.Email, tt.account)
		}
		if a := s.ask("POST /user", credentials(tt.typed, password)); a.status != tt.register {
			t.Errorf("POST /user %q: status %d, want %d: %s", tt.typed, a.status, tt.register, a.body)
		}
		if tt.register != 201 {
			continue
		}
		if n := query[int](s, `SELECT count(*) FROM users WHERE email = ?`, tt.typed); n != 1 {
			t.Errorf("the original finds %d accounts of %q, want one", n, tt.typed)
		}
	}
}

func TestDatesAreReadAsTheOriginalReadsThem(t *testing.T) {
	t.Parallel()
	file := originalFile(t, strings.ReplaceAll(originalDDL, "DATETIME NOT NULL", "DATETIME"))
	db, err := openDatabase(t.Context(), file.dbPath)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	const (
		noDate = "1970-01-01T00:00:00.000Z"
		day    = "2025-03-30T00:00:00.000Z"
		inHash = true // a session hash can have that form
	)
	for _, tt := range []struct {
		column any
		want   string
		inHash bool
	}{
		{millis, millisTime, false},
		{0, noDate, false},
		{1743364800123.9, millisTime, false},
		{"1743364800123", millisTime, false},
		{"2025-03-30", day, false},
		{"2025-03-30 20:00:00", testTime, false},
		{"2025-03-30 20:00:00+00:00", testTime, false},
		{"2025-03-30T20:00:00Z", testTime, inHash},
		{"2025-03-30T22:00:00.1234+02:00", millisTime, inHash},
		{nil, noDate, false}, // what cannot be read keeps nobody out
		{"", noDate, inHash},
		{"yesterday", noDate, inHash},
		{"2025-02-30", noDate, inHash},
		{[]byte{0xff, 0}, noDate, false},
		{int64(1 << 62), noDate, false},
	} {
		file.exec(`DELETE FROM users; INSERT INTO users VALUES ('1', 'Ada', 'a@b', '', ?1, ?1),
			('2', 'Ada', 'c@d', '', ?1, ?2), ('3', 'Ada', 'e@f', '', ?2, ?1)`, tt.column, millis)
		readable := tt.want
		if tt.want == noDate && tt.column != 0 {
			readable = millisTime // the other one stands in
		}
		for email, want := range map[string]User{
			"a@b": {"1", "Ada", "a@b", tt.want, tt.want},
			"c@d": {"2", "Ada", "c@d", readable, millisTime},
			"e@f": {"3", "Ada", "e@f", millisTime, readable},
		} {
			if user, _, err := db.UserByEmail(t.Context(), email); user != want || err != nil {
				t.Errorf("%T %v is read as %v, %v, want %v", tt.column, tt.column, user, err, want)
			}
		}
		if !tt.inHash {
			continue
		}
		text := tt.column.(string)
		if got, _ := userTimes(parseSessionTime, text, text); got != tt.want {
			t.Errorf("%s is read of a hash as %s, want %s", text, got, tt.want)
		}
	}
}

func FuzzTimes(f *testing.F) {
	f.Add("2025-03-30T20:00:00.123456Z", int64(1743364800123), -180)
	f.Add("0000-01-01T00:00:00+23:59", int64(-1), 330)
	f.Add("Sun Mar 30 2025 20:00:00 GMT+0000 (日本標準時 (x))", int64(0), 0)
	f.Add("2025-03-30 20:00:00", int64(1), -1439)
	inTimeFormat := regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$`)
	begin := time.Date(0, 1, 2, 0, 0, 0, 0, time.UTC).UnixMilli()
	end := time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC).UnixMilli()
	f.Fuzz(func(t *testing.T, text string, millis int64, zone int) {
		skipLong(t, text)
		for _, parse := range []func(string) (string, bool){parseSessionTime, parseColumnTime} {
			got, ok := parse(text)
			if again, _ := parse(got); ok && (!inTimeFormat.MatchString(got) || again != got) {
				t.Errorf("%q is read as %q, and that as %q", text, got, again)
			}
		}
		instant := time.UnixMilli(begin + int64(uint64(millis)%uint64(end-begin))).UTC()
		local := instant.In(time.FixedZone("", zone%(24*60)*60))
		exact := instant.Format("2006-01-02T15:04:05.000Z")
		seconds := instant.Format("2006-01-02T15:04:05.") + "000Z"
		toString := local.Format("Mon Jan 02 2006 15:04:05 GMT-0700")
		offset := local.Format("2006-01-02T15:04:05.000-07:00")
		for _, form := range []struct {
			parse func(string) (string, bool)
			text  string
			want  string
		}{
			{parseSessionTime, toString, seconds},
			{parseSessionTime, toString + " (" + text + ")", seconds},
			{parseSessionTime, offset, exact},
			{parseColumnTime, offset, exact},
			{parseColumnTime, strconv.FormatInt(instant.UnixMilli(), 10), exact},
			{parseColumnTime, local.Format("2006-01-02 15:04:05.000-07:00"), exact},
			{parseColumnTime, instant.Format("2006-01-02T15:04:05.000"), exact},
			{parseColumnTime, instant.Format("2006-01-02 15:04:05.000"), exact},
			{parseColumnTime, instant.Format(time.DateTime), seconds},
			{parseColumnTime, exact[:10], exact[:10] + "T00:00:00.000Z"},
			{parseColumnTime, strconv.FormatInt(instant.UnixMilli(), 10) + ".9", exact},
		} {
			if got, ok := form.parse(form.text); got != form.want || !ok {
				t.Errorf("%q is read as %q, %v, want %q", form.text, got, ok, form.want)
			}
		}
	})
}

// TestBothProgramsShareOneFile has the original write to its file, from connections of another process that
// know nothing of WAL, while two processes of the service start on it, register and sign in.
func TestBothProgramsShareOneFile(t *testing.T) {
	t.Parallel()
	file := originalFile(t, originalDDL+`CREATE TABLE "_prisma_migrations" (id TEXT NOT NULL PRIMARY KEY)`)
	original := openSQL(t, file.dbPath)
	defer original.Close()
	var accounts sync.Map // by email, those that either program answered
	var theirs atomic.Value
	register := func() error { // as the original does
		email := "Original." + newEmail()
		hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost+2)
		if err == nil {
			_, err = original.Exec(`INSERT INTO users VALUES (?, 'Ada', ?, ?, ?, ?)`,
				newUUID(), email, "$2b$"+string(hash[4:]), millis, "2025-03-30T20:00:00.123+00:00")
		}
		if err == nil {
			accounts.Store(email, true)
			theirs.Store(email)
		}
		return err
	}
	if err := register(); err != nil {
		t.Fatal(err)
	}
	ctx, done := context.WithCancel(t.Context())
	var writing sync.WaitGroup
	stop := func() {
		done()
		writing.Wait()
	}
	defer stop()
	for range 2 {
		writing.Go(func() {
			for ctx.Err() == nil {
				if err := register(); err != nil {
					t.Errorf("the original registers: %v", err)
				}
			}
		})
	}
	services := []*service{startProcess(t, "DB_PATH="+file.dbPath), startProcess(t, "DB_PATH="+file.dbPath)}
	together(2, func(i int) {
		for range rounds(3, 50) {
			email := "Mixed.Case." + newEmail()
			a, err := services[i].send("POST /user", credentials(email, password))
			if err != nil || a.status != 201 {
				t.Errorf("POST /user: %v, %v, want 201", a, err)
				return
			}
			accounts.Store(email, true)
			other := services[1-i]
			other.want(200, a.cookie.Value)
			for _, email := range []string{email, theirs.Load().(string)} {
				status := other.status("POST /user/signin", credentials(email, password))
				if status != 200 {
					t.Errorf("POST /user/signin %s: status %d, want 200", email, status)
				}
			}
		}
	})
	services[0].stop() // while the original writes
	stop()
	services[1].stop()
	file.holds(&accounts)
}

// ---------------------------------------------------------------------------------------------------
// The code: what another session backend has to pass.

func TestSessionStores(t *testing.T) {
	t.Parallel()
	t.Run("map", func(t *testing.T) { testSessionStore(t, newMapSessions(failing("", nil))) })
	t.Run("sqlite", func(t *testing.T) { testSessionStore(t, &sqliteSessions{openTestDatabase(t)}) })
	t.Run("redis", func(t *testing.T) { testSessionStore(t, openRedisSessions(t, redisURL(t))) })
}

// testSessionStore is what every session backend has to pass.
func testSessionStore(t *testing.T, store SessionStore) {
	s := checkedStore{t, store}
	if err := s.Ping(t.Context()); err != nil {
		t.Errorf("Ping: %v", err)
	}
	s.none(newUUID())
	user := testUser(1)
	id, other := s.create(user, time.Hour), s.create(user, time.Hour)
	s.some(id, user)
	s.remove(id)
	s.none(id)
	s.some(other, user)

	strange := testUser(1)
	strange.Name = "李 \r\n$5\r\n*1\x00\xff\"'"
	strange.Email = strings.Repeat("x", 5000)
	s.some(s.create(strange, time.Hour), strange)

	short := s.create(user, time.Second)
	eventually(t, 10*time.Second, "the session ends", func() bool {
		_, err := s.Get(t.Context(), short)
		return errors.Is(err, errNoSession)
	})
	s.none(short)

	together(50, func(i int) { // each gets its own
		user := testUser(i)
		id := s.create(user, time.Hour)
		for range 10 {
			s.some(id, user)
		}
	})
	for range 5 {
		s.readWhileDeleted()
	}
}

func (s checkedStore) readWhileDeleted() {
	user := testUser(1)
	id := s.create(user, time.Hour)
	var deleted atomic.Bool
	together(9, func(i int) {
		if i == 0 {
			s.remove(id)
			deleted.Store(true)
			return
		}
		for range 20 {
			gone := deleted.Load()
			got, err := s.get(id)
			if err == nil && (gone || got != user) || err != nil && !errors.Is(err, errNoSession) {
				s.Errorf("Get: %v, %v (deleted before: %v)", got, err, gone)
			}
		}
	})
	s.none(id)
}
