package registry

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

// errClear refuses an unencrypted request to a host that may not have one.
var errClear = errors.New("plain http refused")

// tries is how often a request or a transfer is made before giving up.
const tries = 5

// fainter is how often a request is made that does not even get a connection: whoever is not there shall not be waited
// for long.
const fainter = 3

// patience is the longest wait that a registry may impose by Retry-After.
const patience = time.Minute

// retrying is the transport below the signing in: it keeps to https, and sends again what may be sent again.
// go-containerregistry would choose plain http by itself for private addresses and .local names.
type retrying struct {
	strict, lax *http.Transport
	plain       map[string]bool
	certs       []string         // directories with certificates by host
	hosts       map[string]trust // what is configured beside them
	base        time.Duration    // the first wait
	still       time.Duration    // how long an answer, or a transfer, may stand still

	mu  sync.Mutex
	own map[string]*http.Transport // by host
}

func newRetrying(plain map[string]bool, certs []string, base time.Duration) *retrying {
	strict := http.DefaultTransport.(*http.Transport).Clone()
	strict.DialContext = (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext
	strict.MaxIdleConnsPerHost = 2 * parallel
	strict.ResponseHeaderTimeout = 2 * time.Minute
	lax := strict.Clone()
	lax.TLSClientConfig = &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12}
	return &retrying{strict: strict, lax: lax, plain: plain, certs: certs, base: base, still: Stillness, own: map[string]*http.Transport{}}
}

// RoundTrip implements http.RoundTripper. Requests whose body cannot be had again are sent once.
func (t *retrying) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != "https" && !t.clear(req.URL.Host) {
		return nil, errClear
	}
	via, err := t.via(req.URL.Host)
	if err != nil {
		return nil, err
	}
	for try := 1; ; try++ {
		resp, err := Patient(via, t.still).RoundTrip(req)
		if try == tries || req.Context().Err() != nil || !passing(resp, err) && !(try < fainter && faint(err)) || !again(req) {
			return resp, err
		}
		wait, ok := t.wait(try, resp)
		if !ok {
			return resp, err
		}
		if resp != nil {
			_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, maxAnswer)) // only so that the connection is kept
			resp.Body.Close()
		}
		if err := sleep(req.Context(), wait); err != nil {
			return nil, err
		}
		if req, err = rewound(req); err != nil {
			return nil, err
		}
	}
}

// clear reports whether a host may be spoken to without encryption.
func (t *retrying) clear(host string) bool {
	return t.plain[host] || t.hosts[host].plain || loopback(host)
}

// wait returns how long to wait after the given try, and false if the registry asks for more than we have
// patience for.
func (t *retrying) wait(try int, resp *http.Response) (time.Duration, bool) {
	d := t.base
	for range try - 1 {
		d *= 3
	}
	d += time.Duration(rand.Int64N(int64(d)/4 + 1)) // many builds that failed together shall not come back together
	if resp == nil {
		return d, true
	}
	if told, ok := retryAfter(resp); ok {
		return told, told <= patience
	}
	return d, true
}

// retryAfter returns how long the registry wants to be left alone, and whether it says so: in seconds, or as a time,
// which is counted from the time that its own clock shows.
func retryAfter(resp *http.Response) (time.Duration, bool) {
	text := strings.TrimSpace(resp.Header.Get("Retry-After"))
	if s, err := strconv.ParseUint(text, 10, 31); err == nil {
		return time.Duration(s) * time.Second, true
	}
	until, err := http.ParseTime(text)
	if err != nil {
		return 0, false
	}
	now, err := http.ParseTime(resp.Header.Get("Date"))
	if err != nil {
		return 0, false
	}
	return max(until.Sub(now), 0), true
}

// told returns how long the registry said to wait with an error, and false if that is more than we have patience for.
func told(err error) (time.Duration, bool) {
	var e *Error
	if !errors.As(err, &e) {
		return 0, true
	}
	return e.after, e.after <= patience
}

// passing reports whether an outcome is worth another try.
func passing(resp *http.Response, err error) bool {
	if err != nil {
		return broken(err)
	}
	return passingStatus(resp.StatusCode)
}

func passingStatus(s int) bool {
	return s == http.StatusRequestTimeout || s == http.StatusTooManyRequests || s >= 500 && s != http.StatusNotImplemented
}

func again(req *http.Request) bool {
	return req.Body == nil || req.Body == http.NoBody || req.GetBody != nil
}

func rewound(req *http.Request) (*http.Request, error) {
	if req.GetBody == nil {
		return req, nil
	}
	body, err := req.GetBody()
	if err != nil {
		return nil, err
	}
	next := req.Clone(req.Context())
	next.Body = body
	return next, nil
}

// broken reports whether a connection that existed broke. One that was refused is not tried again: for a
// mirror that is down the origin is asked at once.
func broken(err error) bool {
	const late = "timeout awaiting response headers" // of the transport, for errors.Is a deadline like that of a context
	if errors.Is(err, errStalled) || strings.Contains(err.Error(), late) {
		return true
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return false
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) {
		return true
	}
	// The errno values are system calls' business, which this room has none of.
	s := err.Error()
	for _, sign := range []string{"connection reset by peer", "broken pipe", "http2: server sent GOAWAY", "stream error:", "use of closed network connection", "server closed idle connection"} {
		if strings.Contains(s, sign) {
			return true
		}
	}
	return false
}

// faint reports whether there was no connection for a reason that may pass: a name server that is busy, a packet lost.
func faint(err error) bool {
	var dns *net.DNSError
	if errors.As(err, &dns) {
		return dns.IsTemporary && !dns.IsNotFound
	}
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "dial" && op.Timeout()
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
