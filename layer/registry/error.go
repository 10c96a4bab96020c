package registry

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
	"unicode"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// Class is the kind of an [Error], as far as a caller acts differently on it.
type Class int

// The classes of errors.
const (
	Other        Class = iota
	NotFound           // no such repository, tag, manifest or blob
	Unauthorized       // the registry wants to know who asks, or did not accept the answer
	Denied             // the registry knows who asks and refuses
	TooMany            // a rate limit
	Unreachable        // no answer: name lookup, connection, timeout, or nothing but server errors
	TLS                // the connection could not be made secure
	Incomplete         // a manifest refers to what the registry turned out to lack: pushing blobs and manifest again may help
)

func (c Class) String() string {
	switch c {
	case NotFound:
		return "not found"
	case Unauthorized:
		return "unauthorized"
	case Denied:
		return "denied"
	case TooMany:
		return "too many requests"
	case Unreachable:
		return "unreachable"
	case TLS:
		return "no secure connection"
	case Incomplete:
		return "the registry lacks a blob of the manifest"
	case Other:
	}
	return "request refused"
}

// Error is a request that a registry did not grant. Its text is one line, names the reference and holds no
// credentials.
type Error struct {
	Ref    string // full reference, with digest for a blob
	Class  Class
	Status int    // of the HTTP answer; 0 if there was none
	Text   string // what the registry or the network said; may be empty
	Err    error  // cause, if it was not an answer; never printed as is, for it may quote URLs

	after time.Duration // how long the registry said to wait
}

func (e *Error) Error() string {
	s := e.Class.String()
	if e.Class == Other && e.Text != "" {
		s = e.Text
	} else if e.Text != "" && !strings.EqualFold(e.Text, s) {
		s += ": " + e.Text
	}
	if e.Ref == "" {
		return s
	}
	return e.Ref + ": " + s
}

// Unwrap returns the cause, so that a cancelled context is still seen as one.
func (e *Error) Unwrap() error { return e.Err }

// Is reports the class of an error in the chain of err; false if there is none of that class.
func Is(err error, c Class) bool {
	var e *Error
	return errors.As(err, &e) && e.Class == c
}

// maxAnswer bounds what is read of an error's body.
const maxAnswer = 64 << 10

// answered turns a response into an error unless its status is one of ok. The body is consumed then.
func answered(resp *http.Response, ok ...int) error {
	for _, s := range ok {
		if resp.StatusCode == s {
			return nil
		}
	}
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxAnswer)) // a cut body loses the message, not the status
	var said struct {
		Errors []struct{ Code, Message string }
	}
	_ = json.Unmarshal(body, &said)
	var texts []string
	for _, e := range said.Errors {
		texts = append(texts, strings.TrimSpace(strings.TrimSuffix(strings.ToLower(strings.ReplaceAll(e.Code, "_", " "))+": "+e.Message, ": ")))
	}
	e := fromStatus(resp.StatusCode, strings.Join(texts, "; "))
	e.after, _ = retryAfter(resp)
	return e
}

func fromStatus(status int, text string) *Error {
	e := &Error{Status: status, Class: classOf(status), Text: oneLine(text)}
	switch {
	case e.Class == NotFound:
		e.Text = ""
	case e.Text == "":
		e.Text = strings.TrimSpace(fmt.Sprintf("%d %s", status, http.StatusText(status)))
	case e.Class == Other || e.Class == Unreachable:
		e.Text += fmt.Sprintf(" (%d)", status)
	}
	return e
}

func classOf(status int) Class {
	switch {
	case status == http.StatusNotFound:
		return NotFound
	case status == http.StatusUnauthorized:
		return Unauthorized
	case status == http.StatusForbidden:
		return Denied
	case status == http.StatusTooManyRequests:
		return TooMany
	case status >= 500 && status != http.StatusNotImplemented:
		return Unreachable
	}
	return Other
}

// explain makes an *Error of whatever the HTTP client returned, with the reference.
func explain(err error, ref string) error {
	if err == nil {
		return nil
	}
	var e *Error
	if errors.As(err, &e) {
		named := *e
		if named.Ref == "" {
			named.Ref = ref
		}
		return &named
	}
	var local errOpen
	if errors.As(err, &local) {
		return fmt.Errorf("%s: %w", ref, local.error)
	}
	if distrusted(err) { // before what a second try in the clear was told
		return &Error{Ref: ref, Class: TLS, Text: oneLine(connectionText(err)), Err: err}
	}
	var te *transport.Error // what go-containerregistry makes of an answer while signing in
	if errors.As(err, &te) {
		var texts []string
		for _, d := range te.Errors {
			texts = append(texts, strings.ToLower(string(d.Code))+": "+d.Message)
		}
		e := fromStatus(te.StatusCode, strings.Join(texts, "; "))
		e.Ref = ref
		if e.Class == NotFound {
			// The host answers, but not as a registry does.
			e.Class, e.Text = Other, "no registry answers there (404)"
		}
		return e
	}
	return &Error{Ref: ref, Class: connectionClass(err), Text: oneLine(connectionText(err)), Err: err}
}

func connectionClass(err error) Class {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return Other
	}
	var (
		record tls.RecordHeaderError
		alert  tls.AlertError
	)
	if errors.Is(err, errClear) || errors.As(err, &record) || errors.As(err, &alert) || distrusted(err) ||
		strings.Contains(err.Error(), "server gave HTTP response to HTTPS client") {
		return TLS
	}
	var netErr net.Error
	if errors.As(err, &netErr) || broken(err) {
		return Unreachable
	}
	return Other
}

// distrusted reports whether a host's certificate was not accepted.
func distrusted(err error) bool {
	var (
		cert    *tls.CertificateVerificationError
		unknown x509.UnknownAuthorityError
		host    x509.HostnameError
		invalid x509.CertificateInvalidError
	)
	return errors.As(err, &cert) || errors.As(err, &unknown) || errors.As(err, &host) || errors.As(err, &invalid)
}

// connectionText is the innermost useful text: URLs are left out, since query strings carry tokens.
func connectionText(err error) string {
	if strings.Contains(err.Error(), "server gave HTTP response to HTTPS client") || errors.Is(err, errClear) {
		return "the host speaks plain http, which only loopback hosts and hosts listed as insecure may"
	}
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Error()
	}
	var u *url.Error
	for errors.As(err, &u) {
		err = u.Err
	}
	return err.Error()
}

// oneLine makes foreign text fit to show: one line, printable, bounded.
func oneLine(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsSpace(r) {
			return ' '
		}
		if !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	s = strings.Join(strings.Fields(s), " ")
	if r := []rune(s); len(r) > 300 {
		s = string(r[:300]) + "…"
	}
	return s
}
