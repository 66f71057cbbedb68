// Command session-storage registers users, signs them in and tells other services which user a session
// belongs to. This file is the life of the process: flags, configuration, wiring, serving, shutting down.
package main

import (
	"context"
	"errors"
	"expvar"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	_ "net/http/pprof" // on DefaultServeMux, as expvar; only serveDebug serves it
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/crypto/bcrypt"
)

// version is set by the image's build (-ldflags "-X main.version=…"), which has no repository to ask.
var version string

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	os.Exit(run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr))
}

// run is the program. It returns the exit status: 0 after a clean end, 1 when the service could not run,
// 2 when it was started wrongly.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("session-storage", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		fmt.Fprintln(stderr, "usage: session-storage [-healthcheck | -version]\n"+
			"All else is set by environment variables.")
	}
	showVersion := flags.Bool("version", false, "print what the build knows of itself")
	healthcheck := flags.Bool("healthcheck", false, "ask the running service whether it is well")
	if err := flags.Parse(args); err != nil {
		return 2 // Parse has said why
	}
	if flags.NArg() > 0 {
		flags.Usage()
		return 2
	}
	if *showVersion {
		build, _ := debug.ReadBuildInfo()
		fmt.Fprintf(stdout, "session-storage %s\n%s", buildVersion(), build)
		return 0
	}
	cfg, err := loadConfig(getenv)
	if err != nil && *healthcheck {
		fmt.Fprintln(stderr, err)
		return 1 // of a health check Docker knows 0 and 1
	}
	if err != nil {
		fmt.Fprintln(stderr, err)
		return 2
	}
	if *healthcheck {
		err = checkHealth(cfg.addr)
	} else {
		tuneRuntime(getenv)
		log := slog.New(slog.NewJSONHandler(stderr, &slog.HandlerOptions{Level: cfg.logLevel}))
		err = serve(ctx, cfg, log)
	}
	if err != nil {
		fmt.Fprintln(stderr, "session-storage:", err)
		return 1
	}
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

// config is the environment, checked.
type config struct {
	addr      string
	debugAddr string // "": no debug server
	dbPath    string
	redis     *redisTarget // nil: sessions live in the account database
	logLevel  slog.Level
	server    serverConfig
}

// environment reads variables and collects what is wrong with them.
type environment struct {
	getenv func(string) string
	errs   []error
}

// loadConfig reads every variable. Its error has a line for each that is wrong.
func loadConfig(getenv func(string) string) (config, error) {
	env := &environment{getenv: getenv}
	addr := ":8080"
	if port := read(env, "PORT", "", parsePort); port != "" {
		addr = ":" + port
	}
	cfg := config{
		addr:      read(env, "ADDR", addr, parseAddr),
		debugAddr: read(env, "DEBUG_ADDR", "", parseAddr),
		dbPath:    read(env, "DB_PATH", "users.db", parsePath),
		redis:     read(env, "REDIS_URL", "", parseRedis),
		logLevel:  read(env, "LOG_LEVEL", "info", parseLogLevel),
		server: serverConfig{
			sessionTTL:     read(env, "SESSION_TTL", "168h", parseTTL),
			bcryptCost:     read(env, "BCRYPT_COST", "12", parseCost),
			bcryptSlots:    runtime.GOMAXPROCS(0), // one a core: tuneRuntime comes later
			cookieSecure:   read(env, "COOKIE_SECURE", "true", parseBool),
			trustedProxies: read(env, "TRUSTED_PROXIES", "", parseProxies),
			compareHash:    bcrypt.CompareHashAndPassword,
		},
	}
	return cfg, errors.Join(env.errs...)
}

// read returns a variable's value. Where the variable is empty the fallback is parsed, and where that is
// empty too the value is zero.
func read[T any](env *environment, name, fallback string, parse func(string) (T, error)) T {
	text := env.getenv(name)
	if text == "" {
		text = fallback
	}
	var value T
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

func parsePath(text string) (string, error) {
	if text == ":memory:" || strings.HasPrefix(text, "file:") {
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
	levels := map[string]slog.Level{
		"debug": slog.LevelDebug,
		"info":  slog.LevelInfo,
		"warn":  slog.LevelWarn,
		"error": slog.LevelError,
	}
	level, ok := levels[text]
	if !ok {
		return 0, fmt.Errorf("%q is not debug, info, warn or error", text)
	}
	return level, nil
}

func parseTTL(text string) (time.Duration, error) {
	ttl, err := time.ParseDuration(text)
	if err != nil || ttl < time.Second || ttl%time.Second != 0 {
		return 0, fmt.Errorf("%q is not a duration in whole seconds, 1s or more, such as 168h or 30m", text)
	}
	return ttl, nil
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

// tuneRuntime sets what the environment leaves unset. The live heap is a few megabytes, so the default
// GOGC=100 would collect it hundreds of times a second under load. And there are threads enough beside
// those that bcrypt holds for its quarter of a second: the kernel shares a core between threads fairly,
// where Go's scheduler, with as many bcrypts as threads, makes a GET /user wait for its slices of 10 ms
// (BenchmarkUserDuringSignIns).
func tuneRuntime(getenv func(string) string) {
	if getenv("GOGC") == "" {
		debug.SetGCPercent(800)
	}
	if getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(2 * runtime.GOMAXPROCS(0))
	}
}

// serve opens the stores, serves until ctx ends or serving fails, finishes what is running and closes
// everything in the reverse order.
func serve(ctx context.Context, cfg config, log *slog.Logger) error {
	db, err := openDatabase(ctx, cfg.dbPath)
	if err != nil {
		return fmt.Errorf("DB_PATH=%q: %w", cfg.dbPath, err)
	}
	defer db.Close()
	var sessions SessionStore = &sqliteSessions{db} // another backend is wired here
	backend := "sqlite " + cfg.dbPath
	stats := func() map[string]int64 { return nil }
	if cfg.redis != nil {
		store := newRedisSessions(cfg.redis)
		sessions = store
		backend = cfg.redis.String()
		stats = store.metrics
	}
	defer sessions.Close()
	trySession(ctx, sessions, log)
	s := newServer(cfg.server, db, sessions, log)
	tcp, err := net.Listen("tcp", cfg.addr)
	if err != nil {
		return fmt.Errorf("ADDR=%q: %w", cfg.addr, err)
	}
	defer tcp.Close()
	if cfg.debugAddr != "" {
		if err := serveDebug(cfg.debugAddr, s, stats, log); err != nil {
			return fmt.Errorf("DEBUG_ADDR=%q: %w", cfg.debugAddr, err)
		}
	}
	if !cfg.server.cookieSecure {
		log.Warn("COOKIE_SECURE=false: session cookies travel over plain HTTP, " +
			"where anybody on the way can read them")
	}
	log.Info("listening", "addr", tcp.Addr().String(), "accounts", cfg.dbPath, "sessions", backend,
		"version", buildVersion())
	return serveHTTP(ctx, &listener{Listener: tcp, repeats: s.repeats}, s, log)
}

// trySession makes, reads and deletes a session, and logs what the store refuses: one that answers may yet
// take no writes. The service starts all the same.
func trySession(ctx context.Context, sessions SessionStore, log *slog.Logger) {
	id := newUUID()
	now, _ := formatTime(time.Now())
	user := User{ID: id, Name: "trial", Email: "trial", CreatedAt: now, UpdatedAt: now}
	err := sessions.Create(ctx, id, user, time.Minute)
	if err == nil {
		_, err = sessions.Get(ctx, id)
	}
	if err == nil {
		err = sessions.Delete(ctx, id)
		if errors.Is(err, errNoSession) {
			err = nil // the first of two tries had deleted it
		}
	}
	switch {
	case errors.Is(err, errRefused):
		log.Error("session store refuses a trial session, answering 503 to what it refuses", "err", err)
	case err != nil:
		log.Error("session store out of reach, answering 503 until it is back", "err", err)
	}
}

// listener accepts clients' connections.
type listener struct {
	net.Listener
	repeats *repeats
}

// Accept logs its errors as warnings, such as too many open files. net/http tells only its ErrorLog, and
// tries again.
func (l *listener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		if !errors.Is(err, net.ErrClosed) {
			l.repeats.log(slog.LevelWarn, "cannot accept connections", "err", err)
		}
		return nil, err
	}
	return newClientConn(conn), nil
}

// clientConn is a client's connection that spares lookups two costs of net/http: its watch and its
// deadlines.
//
// The watch: while a handler runs, net/http reads the next byte in a goroutine of its own, to notice a
// client that hangs up. That could not end a lookup any sooner, so for GET there is nothing to read.
// Sign-ins keep the watch. It can guess wrong (a body that begins with "GET ", pipelining): then a client
// that has left is noticed when it is answered.
//
// The deadlines: net/http moves them seven times a request, each time a change of the runtime's timers.
// Here the socket keeps an earlier deadline for reading than was asked for; only when it passes is it moved
// to where it should be. The one for writing may be a second early.
type clientConn struct {
	net.Conn
	get  bool // the last Read began with "GET ", and its request has not been watched yet
	read deadline

	writeBy time.Time // the socket's deadline for writing
}

func newClientConn(conn net.Conn) *clientConn {
	return &clientConn{Conn: conn, read: deadline{set: conn.SetReadDeadline}}
}

// Read returns no byte and no error to the watch, which reads a single byte, once. Whoever else reads a
// single byte (net/http's buffer, when it is full but for that) tries again and gets it.
func (c *clientConn) Read(p []byte) (int, error) {
	if len(p) == 1 && c.get {
		c.get = false
		return 0, nil
	}
	n, err := c.Conn.Read(p)
	for n == 0 && c.read.early(err) {
		n, err = c.Conn.Read(p)
	}
	c.get = strings.HasPrefix(string(p[:min(n, 4)]), "GET ")
	return n, err
}

func (c *clientConn) SetReadDeadline(t time.Time) error { return c.read.move(t) }

// SetWriteDeadline leaves a deadline that is less than a second earlier, and the last one behind an answer,
// when nothing is written.
func (c *clientConn) SetWriteDeadline(t time.Time) error {
	later := t.Sub(c.writeBy)
	if t.IsZero() || later >= 0 && later < time.Second {
		return nil
	}
	c.writeBy = t
	return c.Conn.SetWriteDeadline(t)
}

func (c *clientConn) SetDeadline(t time.Time) error {
	if err := c.read.move(t); err != nil {
		return err
	}
	c.writeBy = t
	return c.Conn.SetWriteDeadline(t)
}

// CloseWrite lets net/http end an answer before it has read the whole request.
func (c *clientConn) CloseWrite() error {
	if conn, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return conn.CloseWrite()
	}
	return nil
}

// deadline is a connection's, moved lazily. The zero time is none.
type deadline struct {
	set    func(time.Time) error // moves the socket's
	mu     sync.Mutex
	wanted time.Time
	actual time.Time // the socket's: wanted or an earlier one; when it fires, early moves it
}

// move sets the deadline. A later one than the socket's is only noted, and early applies it.
func (d *deadline) move(t time.Time) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.wanted = t
	if !d.actual.IsZero() && (t.IsZero() || !t.Before(d.actual)) {
		return nil
	}
	d.actual = t
	return d.set(t)
}

// early tells whether err says that the socket's deadline passed although the one that is wanted has not, and
// then moves the socket's there.
func (d *deadline) early(err error) bool {
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.wanted.IsZero() && !time.Now().Before(d.wanted) {
		return false
	}
	d.actual = d.wanted
	return d.set(d.wanted) == nil
}

// serveHTTP serves until ctx ends, then drains. The requests' contexts are not ctx's children: draining
// must finish what runs, not cancel it.
func serveHTTP(ctx context.Context, listener net.Listener, s *server, log *slog.Logger) error {
	hs := &http.Server{
		Handler:                      s,
		MaxHeaderBytes:               16 << 10,
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
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	// Shutdown closes a keep-alive connection that looks idle although its next request may be on the
	// way. So for a moment only the listener is closed, and each answer says that it is the last.
	listener.Close()
	time.Sleep(250 * time.Millisecond)
	err := hs.Shutdown(ctx)
	if err == nil {
		err = s.finish(ctx)
	}
	if err != nil {
		hs.Close()
		log.Warn("requests cut off", "err", err)
	}
	s.repeats.flush()
	log.Info("stopped")
	return nil
}

// serveDebug serves expvar and pprof on an address of their own, until the process ends.
func serveDebug(addr string, s *server, stats func() map[string]int64, log *slog.Logger) error {
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	expvar.Publish("service", expvar.Func(func() any {
		metrics := s.metrics()
		maps.Copy(metrics, stats())
		return metrics
	}))
	expvar.NewString("version").Set(buildVersion())
	debugServer := &http.Server{ReadHeaderTimeout: 5 * time.Second} // of http.DefaultServeMux
	go debugServer.Serve(listener)
	log.Info("debug listening", "addr", listener.Addr().String())
	if !listener.Addr().(*net.TCPAddr).IP.IsLoopback() {
		log.Warn("DEBUG_ADDR is not a loopback address: whoever reaches it can profile this process")
	}
	return nil
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
