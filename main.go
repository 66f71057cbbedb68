// Command session-storage registers users, signs them in and tells other services which user a session
// belongs to. This file is the life of the process: flags, configuration, wiring, serving, shutting down.
package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"expvar"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"

	"golang.org/x/crypto/bcrypt"
)

// version is set by the image's build (-ldflags "-X main.version=…"), which has no repository to ask.
var version string

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)   // a second signal ends the process at once
	signal.Ignore(syscall.SIGPIPE) // or a standard error that nobody reads any more ends the process
	os.Exit(run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr))
}

const usage = "usage: session-storage [-healthcheck | -version | -h]"

// run is the program. It returns the exit status: 0 after a clean end, 1 when the service could not run,
// 2 when it was started wrongly.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("session-storage", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {} // run prints it
	showVersion := flags.Bool("version", false, "print what the build knows of itself")
	healthcheck := flags.Bool("healthcheck", false,
		"ask the running service whether it is well, exit with status 0 or 1")
	err := flags.Parse(args)
	if errors.Is(err, flag.ErrHelp) { // -h, -help
		printHelp(stdout, flags)
		return 0
	}
	if err != nil || flags.NArg() > 0 { // Parse has said what is wrong
		fmt.Fprintln(stderr, usage)
		return 2
	}
	if *showVersion {
		build, _ := debug.ReadBuildInfo()
		fmt.Fprintf(stdout, "session-storage %s\n%s", buildVersion(), build)
		return 0
	}
	cfg, err := loadConfig(getenv)
	if err != nil {
		fmt.Fprintln(stderr, err)
		if *healthcheck {
			return 1 // Docker knows only 0 and 1 of a health check
		}
		return 2
	}
	if *healthcheck {
		if err := checkHealth(cfg.addr); err != nil {
			fmt.Fprintln(stderr, "session-storage:", err)
			return 1
		}
		return 0
	}
	tuneRuntime(getenv)
	lines := newLineWriter(stderr)
	defer lines.close()
	log := slog.New(slog.NewJSONHandler(lines, &slog.HandlerOptions{Level: cfg.logLevel}))
	err = serve(ctx, cfg, log)
	if err != nil && !errors.Is(err, context.Canceled) { // else it was told to stop while it started
		log.Error("cannot serve", "err", err)
		return 1
	}
	log.Info("stopped")
	return 0
}

// buildVersion returns the version given to the image's build, or else the go command's, from the repository.
func buildVersion() string {
	if version != "" {
		return version
	}
	build, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return build.Main.Version
}

// printHelp prints usage, flags and variables.
func printHelp(w io.Writer, flags *flag.FlagSet) {
	fmt.Fprintln(w, usage)
	flags.SetOutput(w)
	flags.PrintDefaults()
	fmt.Fprintln(w, "All else is set by environment variables:")
	env := &environment{getenv: func(string) string { return "" }}
	readConfig(env)
	for _, v := range env.variables {
		fmt.Fprintf(w, "  %s (default %s)\n    \t%s\n", v.name, v.fallback, v.meaning)
	}
}

// config is the environment, checked.
type config struct {
	addr      string
	debugAddr string // "": no debug server
	dbPath    string
	redis     *redisTarget  // nil: sessions live in the account database
	stopDelay time.Duration // from the signal to stop until no more connections are taken
	logLevel  slog.Level
	server    serverConfig
}

// environment reads variables. It collects what they are, and what is wrong with them.
type environment struct {
	getenv    func(string) string
	variables []variable
	errs      []error
}

// variable describes an environment variable for -h and, the same, for README.
type variable struct {
	name     string
	fallback string
	meaning  string
}

// loadConfig reads every variable. Its error has a line for each that is wrong.
func loadConfig(getenv func(string) string) (config, error) {
	env := &environment{getenv: getenv}
	cfg := readConfig(env)
	return cfg, errors.Join(env.errs...)
}

// readConfig reads the variables in the order in which -h and README have them.
func readConfig(env *environment) config {
	addr := ":8080"
	port := readVariable(env, "PORT", "", parsePort, "a port, as hosting platforms set it; ADDR wins")
	if port != "" {
		addr = ":" + port
	}
	return config{
		addr: readVariable(env, "ADDR", addr, parseAddr,
			"address to listen on; where PORT is set the default is :$PORT"),
		dbPath: readVariable(env, "DB_PATH", "users.db", parsePath,
			"the account database, one SQLite file, created when missing"),
		redis: readVariable(env, "REDIS_URL", "", parseRedis,
			"where sessions live, if not in the account database: "+redisURLForms+
				"; ports default to 6379, of sentinels to 26379"),
		server: serverConfig{
			sessionTTL: readVariable(env, "SESSION_TTL", "168h", parseTTL,
				"life of a session, which use does not prolong, and of its cookie, "+
					"in whole seconds, such as 30m"),
			bcryptCost: readVariable(env, "BCRYPT_COST", "12", parseCost,
				"10 to 15; weaker hashes are stored anew after the next sign-in"),
			bcryptSlots: runtime.GOMAXPROCS(0), // one a core: tuneRuntime comes later
			cookieSecure: readVariable(env, "COOKIE_SECURE", "true", parseBool,
				"false for plain HTTP"),
			trustedProxies: readVariable(env, "TRUSTED_PROXIES", "", parseProxies,
				"CIDRs whose X-Forwarded-For is believed, such as 127.0.0.1/32,::1/128,10.0.0.0/8; "+
					"unset, all clients of a proxy share one limit"),
			compareHash: bcrypt.CompareHashAndPassword,
		},
		debugAddr: readVariable(env, "DEBUG_ADDR", "", parseAddr,
			"private address for /debug/vars and /debug/pprof/, such as 127.0.0.1:6060"),
		stopDelay: readVariable(env, "SHUTDOWN_DELAY", "0s", parseStopDelay,
			"how long, up to 60s, the service goes on after SIGTERM with /healthz at 503, "+
				"so that a balancer leaves"),
		logLevel: readVariable(env, "LOG_LEVEL", "info", parseLogLevel,
			"debug, info, warn, error; JSON lines on standard error"),
	}
}

// readVariable returns a variable's value. Where the variable is empty the fallback is parsed, and where that
// is empty too the value is zero.
func readVariable[T any](
	env *environment, name, fallback string, parse func(string) (T, error), meaning string,
) T {
	env.variables = append(env.variables, variable{
		name:     name,
		fallback: cmp.Or(fallback, "unset"),
		meaning:  meaning,
	})
	var value T
	text := cmp.Or(env.getenv(name), fallback)
	if text == "" {
		return value
	}
	value, err := parse(text)
	if err != nil {
		env.errs = append(env.errs, fmt.Errorf("%s: %w", name, err))
	}
	return value
}

func parsePort(text string) (string, error) {
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 {
		return "", fmt.Errorf("%q is not a port from 1 to 65535", text)
	}
	return text, nil
}

func parseAddr(text string) (string, error) {
	_, port, err := net.SplitHostPort(text)
	if err != nil {
		return "", fmt.Errorf("%q is not host:port or :port", text)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return "", fmt.Errorf("%q is not host:port or :port with a port up to 65535", text)
	}
	return text, nil
}

// parsePath refuses what SQLite takes for no file, and what an env file may leave in a value: with a CR,
// quotes or white space at an end DB_PATH would name another file, which would be created.
func parsePath(text string) (string, error) {
	if strings.ContainsFunc(text, unicode.IsControl) {
		return "", fmt.Errorf("%q has a control character: none is allowed", text)
	}
	if strings.TrimSpace(text) != text {
		return "", fmt.Errorf("%q begins or ends with white space: none is allowed there", text)
	}
	if first := text[:1]; len(text) > 1 && strings.Contains(`"'`, first) && strings.HasSuffix(text, first) {
		return "", fmt.Errorf("%q stands in quotes, as no shell took them off: none is allowed there", text)
	}
	if filepath.Clean(text) == ":memory:" || strings.HasPrefix(text, "file:") {
		return "", fmt.Errorf("%q is not the path of a file, such as users.db", text)
	}
	return text, nil
}

func parseRedis(text string) (*redisTarget, error) {
	target, err := parseRedisURL(text)
	if err != nil {
		return nil, fmt.Errorf("%w; want %s", err, redisURLForms)
	}
	return target, nil
}

func parseLogLevel(text string) (slog.Level, error) {
	var level slog.Level
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, text) {
		return level, fmt.Errorf("%q is not debug, info, warn or error", text)
	}
	err := level.UnmarshalText([]byte(text))
	return level, err
}

func parseTTL(text string) (time.Duration, error) {
	ttl, err := time.ParseDuration(text)
	if err != nil || ttl < time.Second || ttl%time.Second != 0 {
		return 0, fmt.Errorf("%q is not a duration in whole seconds, 1s or more, such as 168h or 30m", text)
	}
	return ttl, nil
}

func parseStopDelay(text string) (time.Duration, error) {
	delay, err := time.ParseDuration(text)
	if err != nil || delay < 0 || delay > time.Minute {
		return 0, fmt.Errorf("%q is not a duration from 0s to 60s, such as 5s", text)
	}
	return delay, nil
}

func parseCost(text string) (int, error) {
	cost, err := strconv.Atoi(text)
	if err != nil || cost < 10 || cost > 15 {
		return 0, fmt.Errorf("%q is not a whole number from 10 to 15", text)
	}
	return cost, nil
}

func parseBool(text string) (bool, error) {
	if text != "true" && text != "false" {
		return false, fmt.Errorf("%q is not true or false", text)
	}
	return text == "true", nil
}

// parseProxies reads comma-separated CIDRs. IPv4-mapped ones become IPv4, as clients' addresses do.
func parseProxies(text string) ([]netip.Prefix, error) {
	var proxies []netip.Prefix
	for cidr := range strings.SplitSeq(text, ",") {
		prefix, err := netip.ParsePrefix(strings.TrimSpace(cidr))
		if err != nil {
			return nil, fmt.Errorf("%q is no CIDR: want some, such as 10.0.0.0/8,192.0.2.7/32", cidr)
		}
		if prefix.Addr().Is4In6() {
			bits := prefix.Bits() - (128 - 32)
			if bits < 0 {
				return nil, fmt.Errorf("%q is shorter than /96: write it as IPv4 or IPv6", cidr)
			}
			prefix = netip.PrefixFrom(prefix.Addr().Unmap(), bits)
		}
		proxies = append(proxies, prefix)
	}
	return proxies, nil
}

// tuneRuntime sets what the environment leaves unset. The live heap is a megabyte or two, so the default
// GOGC=100 would collect it dozens of times a second under load, for a sixth of the work of GET /user. At 300
// that is a third of it, and 400 connections that register without end leave the process below 64 MB. There
// are threads enough beside those that bcrypt holds for its quarter of a second: the kernel shares a core
// between threads fairly, where Go's scheduler, with as many bcrypts as threads, makes a GET /user wait for
// its slices of 10 ms (BenchmarkUserDuringSignIns).
func tuneRuntime(getenv func(string) string) {
	if getenv("GOGC") == "" {
		debug.SetGCPercent(300)
	}
	if getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(2 * runtime.GOMAXPROCS(0))
	}
}

// serve opens the stores and serves until ctx ends or serving fails. Then it finishes what is running and
// closes all that it opened, in the reverse order.
func serve(ctx context.Context, cfg config, log *slog.Logger) error {
	db, err := openDatabase(ctx, cfg.dbPath)
	if err != nil {
		return fmt.Errorf("DB_PATH=%q: %w", cfg.dbPath, err)
	}
	defer db.Close()
	var sessions SessionStore = &sqliteSessions{db} // another backend is wired here
	backend := "sqlite " + cfg.dbPath
	metrics := func() map[string]int64 { return nil }
	if cfg.redis != nil {
		store := newRedisSessions(cfg.redis, log)
		sessions = store
		backend = cfg.redis.String()
		metrics = store.metrics
	}
	defer sessions.Close()
	s := newServer(cfg.server, db, sessions, log)
	var listen net.ListenConfig // unlike net.Listen, it heeds ctx while it looks up a name
	tcp, err := listen.Listen(ctx, "tcp", cfg.addr)
	if err != nil {
		return fmt.Errorf("ADDR=%q: %w", cfg.addr, err)
	}
	defer tcp.Close()
	if cfg.debugAddr != "" {
		debugServer, err := serveDebug(ctx, cfg.debugAddr, s, metrics, log)
		if err != nil {
			return fmt.Errorf("DEBUG_ADDR=%q: %w", cfg.debugAddr, err)
		}
		defer debugServer.Close()
	}
	if !cfg.server.cookieSecure {
		log.Warn("COOKIE_SECURE=false: session cookies travel over plain HTTP, " +
			"where anybody on the way can read them")
	}
	log.Info("listening", "addr", tcp.Addr().String(), "accounts", cfg.dbPath, "sessions", backend,
		"version", buildVersion())
	defer s.limited.flush()
	var trial sync.WaitGroup
	defer trial.Wait() // some seconds at most; cut short, it would leave a session
	trial.Go(func() { trySession(context.WithoutCancel(ctx), s, log) })
	return serveHTTP(ctx, &listener{Listener: tcp, server: s}, s, cfg.stopDelay, log)
}

// trySession has the store make, read and delete a session, and logs what goes wrong: a store that answers
// may take no writes, or lose them. The service serves all the same.
func trySession(ctx context.Context, s *server, log *slog.Logger) {
	id := newUUID()
	now, _ := formatTime(time.Now())
	err := s.sessions.Create(ctx, id, User{ID: id, CreatedAt: now, UpdatedAt: now}, time.Minute)
	if err == nil {
		_, err = s.sessions.Get(ctx, id)
		if errors.Is(err, errNoSession) {
			err = fmt.Errorf("%w: a session that it has just taken is not there", errRefused)
		}
	}
	if err == nil {
		err = s.sessions.Delete(ctx, id)
		if errors.Is(err, errNoSession) {
			err = nil // it was sent twice, and the first one deleted the session
		}
	}
	err = s.sessionHealth.observe(ctx, err)
	if err == nil {
		log.Debug("session store takes sessions")
	} else if !errors.Is(err, errUnavailable) { // which observe has logged
		log.Error("request failed", "err", err)
	}
}

// serveHTTP serves until ctx ends, then drains. For stopDelay it still takes connections, but each answer
// says that it is the connection's last. The requests' contexts are not ctx's children: draining must finish
// what runs, not cancel it.
func serveHTTP(
	ctx context.Context, listener net.Listener, s *server, stopDelay time.Duration, log *slog.Logger,
) error {
	hs := &http.Server{
		Handler:                      s,
		MaxHeaderBytes:               48 << 10,         // proxies pass on 32 kB
		ReadTimeout:                  5 * time.Second,  // for the headers; a body has bodyTimeout
		WriteTimeout:                 30 * time.Second, // for body, queue, bcrypt, stores and answer
		IdleTimeout:                  2 * time.Minute,
		DisableGeneralOptionsHandler: true, // or "OPTIONS *" is answered without our headers
		ErrorLog:                     slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	served := make(chan error, 1)
	go func() { served <- hs.Serve(listener) }()
	select {
	case err := <-served:
		return fmt.Errorf("serving: %w", err)
	case <-ctx.Done():
	}
	s.draining.Store(true)
	log.Info("shutting down")
	time.Sleep(stopDelay)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	// Shutdown closes a keep-alive connection that looks idle although its next request may be on the
	// way. So for a moment only the listener is closed, and each answer says that it is the last.
	listener.Close()
	time.Sleep(250 * time.Millisecond)
	err := hs.Shutdown(ctx)
	if err == nil {
		err = s.drain(ctx)
	}
	if err != nil {
		hs.Close()
		log.Warn("requests cut off", "err", err)
	}
	return nil
}

// serveDebug serves expvar and pprof on an address of their own, until the server that it returns is closed.
func serveDebug(
	ctx context.Context, addr string, s *server, metrics func() map[string]int64, log *slog.Logger,
) (*http.Server, error) {
	var listen net.ListenConfig
	listener, err := listen.Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	mux.HandleFunc("/debug/vars", func(w http.ResponseWriter, r *http.Request) {
		writeVars(w, s, metrics)
	})
	debugServer := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go debugServer.Serve(listener)
	log.Info("debug listening", "addr", listener.Addr().String())
	if !listener.Addr().(*net.TCPAddr).IP.IsLoopback() {
		log.Warn("DEBUG_ADDR is not a loopback address: whoever reaches it can profile this process")
	}
	return debugServer, nil
}

// writeVars writes what expvar.Handler would: expvar's own variables and ours. Ours are not published: a
// process may serve more than once, and a name can be published only once.
func writeVars(w http.ResponseWriter, s *server, metrics func() map[string]int64) {
	service := s.metrics()
	for name, value := range metrics() {
		service[name] = value
	}
	vars := map[string]any{"service": service, "version": buildVersion()}
	expvar.Do(func(variable expvar.KeyValue) { // cmdline and memstats
		vars[variable.Key] = json.RawMessage(variable.Value.String())
	})
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	json.NewEncoder(w).Encode(vars)
}

// checkHealth asks the service that listens on addr whether it is well. No host in addr means this one.
func checkHealth(addr string) error {
	client := http.Client{
		Timeout:   5 * time.Second,
		Transport: &http.Transport{}, // no proxy from the environment in between
	}
	healthz := url.URL{Scheme: "http", Host: addr, Path: "/healthz"}
	resp, err := client.Get(healthz.String())
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New("healthz: " + resp.Status)
	}
	return nil
}

// lineWriter writes the log's lines in a goroutine of its own, so that nobody who logs waits for standard
// error: its pipe may be full, and nobody may ever read it. What finds the queue full is dropped.
type lineWriter struct {
	queue   chan []byte   // lines; nil is the end
	dropped atomic.Int64  // lines, since a line last told
	ended   chan struct{} // closed once all before the end is written
}

const (
	maxLogLines = 1000                   // that wait to be written
	logPatience = 500 * time.Millisecond // for them at the end
)

func newLineWriter(w io.Writer) *lineWriter {
	l := &lineWriter{queue: make(chan []byte, maxLogLines), ended: make(chan struct{})}
	go l.run(w)
	return l
}

// Write takes a line of slog's, and never waits.
func (l *lineWriter) Write(line []byte) (int, error) {
	select {
	case l.queue <- bytes.Clone(line):
	default:
		l.dropped.Add(1)
	}
	return len(line), nil
}

// run writes lines until the end. A line that could not be written whole counts as dropped, and the next one
// tells how many were.
func (l *lineWriter) run(w io.Writer) {
	defer close(l.ended)
	cut := false // inside a line
	for line := range l.queue {
		var out bytes.Buffer
		if cut {
			out.WriteByte('\n')
		}
		dropped := l.dropped.Swap(0)
		if dropped > 0 {
			slog.New(slog.NewJSONHandler(&out, nil)).Warn("log lines dropped", "dropped", dropped)
		}
		out.Write(line)
		n, err := w.Write(out.Bytes())
		if n > 0 {
			cut = out.Bytes()[n-1] != '\n'
		}
		if err != nil {
			l.dropped.Add(dropped + 1)
		}
		if line == nil {
			return
		}
	}
}

// close waits until all lines so far are written, but not for long.
func (l *lineWriter) close() {
	timeout := time.After(logPatience)
	select {
	case l.queue <- nil:
	case <-timeout:
		return
	}
	select {
	case <-l.ended:
	case <-timeout:
	}
}

// listener accepts clients' connections.
type listener struct {
	net.Listener
	server *server
}

// Accept logs its errors as warnings, such as too many open files. net/http tells only its ErrorLog, and
// tries again.
func (l *listener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		if !errors.Is(err, net.ErrClosed) {
			l.server.limited.log(l.server.log, slog.LevelWarn, "cannot accept connections", "err", err)
		}
		return nil, err
	}
	return &clientConn{Conn: conn}, nil
}

// clientConn spares lookups the watch of net/http. While a handler runs, net/http reads the next byte in a
// goroutine of its own, to notice a client that hangs up. A lookup is over before that could end it sooner.
// Sign-ins keep the watch.
type clientConn struct {
	net.Conn
	get bool // the last Read began with "GET "
}

// Read returns 0 bytes and no error to the first read of a single byte after a GET: that is the watch, which
// then ends. It may also be a read into net/http's buffer with room for one byte left; net/http repeats that
// one. A request whose body begins with "GET " loses its watch, and its client's leaving is noticed later.
func (c *clientConn) Read(p []byte) (int, error) {
	if c.get && len(p) == 1 {
		c.get = false
		return 0, nil
	}
	n, err := c.Conn.Read(p)
	c.get = strings.HasPrefix(string(p[:min(n, 4)]), "GET ")
	return n, err
}

// CloseWrite lets net/http end an answer before it has read the whole request.
func (c *clientConn) CloseWrite() error {
	if conn, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return conn.CloseWrite()
	}
	return nil
}
