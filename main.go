// Command session-storage registers users, signs them in and tells other services whose a session is.
// This file is the life of the process: configuration, wiring, serving, shutting down.
package main

import (
	"cmp"
	"context"
	"errors"
	"expvar"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	_ "net/http/pprof" // on DefaultServeMux, as expvar; only serveDebug serves it
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	os.Exit(run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr))
}

// run is the program. It returns the exit status: 0 after a clean end, 1 when the service could not run,
// 2 when it was started wrongly.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	cfg, err := loadConfig(getenv)
	switch mode := strings.TrimLeft(strings.Join(args, " "), "-"); {
	case mode == "version":
		info, _ := debug.ReadBuildInfo()
		fmt.Fprint(stdout, info)
		return 0
	case mode != "" && mode != "healthcheck":
		fmt.Fprintln(stderr, "usage: session-storage [-healthcheck | -version]; all else is set by environment variables")
		return 2
	case err != nil:
		fmt.Fprintln(stderr, err)
		return 2
	case mode == "healthcheck":
		err = checkHealth(cfg.addr)
	default:
		gate := newGate(runtime.GOMAXPROCS(0)) // a slot for each core
		tuneRuntime(getenv)
		err = serve(ctx, cfg, gate, slog.New(slog.NewJSONHandler(stderr, &slog.HandlerOptions{Level: cfg.logLevel})))
	}
	if err != nil {
		fmt.Fprintln(stderr, "session-storage:", err)
		return 1
	}
	return 0
}

// config is the environment, checked.
type config struct {
	addr, dbPath, debugAddr string
	redis                   *redisTarget // nil: sessions live in the account database
	sessionTTL              time.Duration
	bcryptCost              int
	cookieSecure            bool
	trustedProxies          []netip.Prefix
	logLevel                slog.Level
}

// loadConfig reads every variable and reports all that are wrong, each by its name, its value and what
// is allowed.
func loadConfig(getenv func(string) string) (cfg config, err error) {
	var errs []error
	read := func(name, fallback, allowed string, ok func(v string) bool) string {
		v := cmp.Or(getenv(name), fallback)
		if v != "" && !ok(v) {
			errs = append(errs, fmt.Errorf("%s=%q: want %s", name, redactURL(v), allowed))
		}
		return v
	}
	oneOf := func(values ...string) func(string) bool {
		return func(v string) bool { return slices.Contains(values, v) }
	}
	cfg.addr = read("ADDR", ":8080", "host:port or :port", validAddr)
	cfg.debugAddr = read("DEBUG_ADDR", "", "host:port, such as localhost:6060", validAddr)
	cfg.dbPath = read("DB_PATH", "users.db", "the path of a file, such as users.db", func(v string) bool {
		return v != ":memory:" && !strings.HasPrefix(v, "file:")
	})
	cfg.bcryptCost, _ = strconv.Atoi(read("BCRYPT_COST", "12", "a whole number from 10 to 15", oneOf("10", "11", "12", "13", "14", "15")))
	cfg.cookieSecure = read("COOKIE_SECURE", "true", "true or false", oneOf("true", "false")) == "true"
	cfg.logLevel.UnmarshalText([]byte(read("LOG_LEVEL", "info", "debug, info, warn or error", oneOf("debug", "info", "warn", "error"))))
	read("REDIS_URL", "", redisURLForms, func(v string) (ok bool) {
		cfg.redis, ok = parseRedisURL(v)
		return ok
	})
	read("SESSION_TTL", "168h", "a duration in whole seconds, 1s or more, such as 168h or 30m", func(v string) bool {
		cfg.sessionTTL, err = time.ParseDuration(v)
		return err == nil && cfg.sessionTTL >= time.Second && cfg.sessionTTL%time.Second == 0
	})
	read("TRUSTED_PROXIES", "", "comma-separated CIDRs, such as 10.0.0.0/8,192.0.2.7/32", func(v string) bool {
		for cidr := range strings.SplitSeq(v, ",") {
			proxies, _ := netip.ParsePrefix(strings.TrimSpace(cidr))
			cfg.trustedProxies = append(cfg.trustedProxies, proxies)
		}
		return !slices.Contains(cfg.trustedProxies, netip.Prefix{}) // what could not be parsed
	})
	return cfg, errors.Join(errs...)
}

func validAddr(addr string) bool {
	_, port, err1 := net.SplitHostPort(addr)
	_, err2 := strconv.ParseUint(port, 10, 16)
	return err1 == nil && err2 == nil
}

// tuneRuntime sets what the environment leaves unset. The live heap is a few megabytes, so the default
// GOGC=100 would collect it hundreds of times a second under load. And for each core there are two threads
// more than a bcrypt could hold for its quarter of a second: the kernel shares a core between threads fairly,
// where Go's scheduler, with as many bcrypts as threads, makes a GET /user wait for its slices of 10 ms
// (BenchmarkUserDuringSignIns).
func tuneRuntime(getenv func(string) string) {
	if getenv("GOGC") == "" {
		debug.SetGCPercent(400)
	}
	if getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(3 * runtime.GOMAXPROCS(0))
	}
}

// serve opens the stores, serves until ctx ends or serving fails, finishes what is running and closes
// everything in the reverse order.
func serve(ctx context.Context, cfg config, gate *gate, log *slog.Logger) error {
	db, err := openDatabase(cfg.dbPath)
	if err != nil {
		return fmt.Errorf("DB_PATH=%q: %w", cfg.dbPath, err)
	}
	defer db.Close()
	metrics := new(expvar.Map)
	backend, sessions := "sqlite "+cfg.dbPath, SessionStore(&sqliteSessions{db}) // another backend is wired here
	if cfg.redis != nil {
		backend, sessions = redactURL(cfg.redis.url), newRedisSessions(cfg.redis, metrics)
	}
	defer sessions.Close()
	if err := sessions.Ping(ctx); err != nil {
		log.Error("session store out of reach, answering 503 until it is back", "err", err)
	}
	listener, err := net.Listen("tcp", cfg.addr)
	if err != nil {
		return fmt.Errorf("ADDR=%q: %w", cfg.addr, err)
	}
	build, _ := debug.ReadBuildInfo()
	if cfg.debugAddr != "" {
		metrics.Set("version", expvar.Func(func() any { return build.Main.Version + " " + build.GoVersion }))
		if err := serveDebug(cfg.debugAddr, metrics, log); err != nil {
			return fmt.Errorf("DEBUG_ADDR=%q: %w", cfg.debugAddr, err)
		}
	}
	if !cfg.cookieSecure {
		log.Warn("COOKIE_SECURE=false: session cookies travel over plain HTTP, where anybody on the way can read them")
	}
	log.Info("listening", "addr", listener.Addr().String(), "accounts", cfg.dbPath, "sessions", backend, "version", build.Main.Version)
	return serveHTTP(ctx, listener, newServer(cfg, db, sessions, gate, metrics, log), log)
}

// serveHTTP serves until ctx ends, then drains. The requests' contexts are not ctx's children: draining
// must finish what runs, not cancel it.
func serveHTTP(ctx context.Context, listener net.Listener, s *server, log *slog.Logger) error {
	hs := &http.Server{
		Handler: s, MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		ReadTimeout:                  5 * time.Second,  // for the headers; readForm allows more for a body
		WriteTimeout:                 30 * time.Second, // from the end of the headers: body, queue for bcrypt, stores, writing
		IdleTimeout:                  2 * time.Minute,
		DisableGeneralOptionsHandler: true, // or "OPTIONS *" is answered without our headers
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
	if err := hs.Shutdown(ctx); err != nil {
		hs.Close()
		log.Warn("requests cut off", "err", err)
	}
	log.Info("stopped")
	return nil
}

// serveDebug serves expvar and pprof on an address of their own, until the process ends.
func serveDebug(addr string, metrics *expvar.Map, log *slog.Logger) error {
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	expvar.Publish("service", metrics)
	go (&http.Server{ReadHeaderTimeout: 5 * time.Second}).Serve(listener) // http.DefaultServeMux
	log.Info("debug listening", "addr", listener.Addr().String())
	if !listener.Addr().(*net.TCPAddr).IP.IsLoopback() {
		log.Warn("DEBUG_ADDR is not a loopback address: whoever reaches it can profile this process")
	}
	return nil
}

// checkHealth asks the service that listens on addr whether it is well. No host in addr means this one.
func checkHealth(addr string) error {
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{}} // no proxy from the environment in between
	resp, err := client.Get("http://" + addr + "/healthz")
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New("healthz: " + resp.Status)
	}
	return err
}
