package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/authn"
)

// signing adds the authorization to requests for one host and gets the tokens that it takes. Other hosts, to
// which a registry may send a download on, see no authorization.
//
// It does what go-containerregistry's own transport does, but asks for one token a right instead of
// collecting rights, and lets a registry on a private address have its token server there, too.
type signing struct {
	next         http.RoundTripper
	host, scheme string
	auth         authn.AuthConfig
	agent        string
	clear        func(host string) bool

	realm, service string // of the token server; no realm: the credentials themselves are sent
	scopes         []string

	mu    sync.Mutex
	token string
}

// RoundTrip implements http.RoundTripper.
func (s *signing) RoundTrip(req *http.Request) (*http.Response, error) {
	req = req.Clone(req.Context()) // a RoundTripper must not change what it is given
	req.Header.Set("User-Agent", s.agent)
	if req.URL.Host != s.host || req.URL.Scheme != s.scheme {
		return s.next.RoundTrip(req)
	}
	token, err := s.authorize(req, "")
	if err != nil {
		return nil, err
	}
	resp, err := s.next.RoundTrip(req)
	if err != nil || resp.StatusCode != http.StatusUnauthorized || s.realm == "" {
		return resp, err
	}
	if !again(req) {
		s.drop(token)
		return resp, err
	}
	resp.Body.Close() // the token has run out
	if req, err = rewound(req); err != nil {
		return nil, err
	}
	if _, err := s.authorize(req, token); err != nil {
		return nil, err
	}
	return s.next.RoundTrip(req)
}

// authorize signs a request, with another token than the one that did not do.
func (s *signing) authorize(req *http.Request, not string) (string, error) {
	switch {
	case s.auth.RegistryToken != "":
		req.Header.Set("Authorization", "Bearer "+s.auth.RegistryToken)
		return "", nil
	case s.realm == "":
		s.basic(req)
		return "", nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.token == not {
		token, err := s.fetch(req.Context())
		if err != nil {
			return "", err
		}
		s.token = token
	}
	req.Header.Set("Authorization", "Bearer "+s.token)
	return s.token, nil
}

// drop forgets a token that did not do, so that the next request gets another.
func (s *signing) drop(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.token == token {
		s.token = ""
	}
}

func (s *signing) basic(req *http.Request) {
	if s.auth.Username != "" || s.auth.Password != "" {
		req.SetBasicAuth(s.auth.Username, s.auth.Password)
	} else if s.auth.Auth != "" {
		req.Header.Set("Authorization", "Basic "+s.auth.Auth)
	}
}

// fetch gets a token: with a refresh token by OAuth2, or where that is not understood by a GET with the
// credentials, if there are any.
func (s *signing) fetch(ctx context.Context) (string, error) {
	realm, err := url.Parse(s.realm)
	if err != nil {
		return "", &Error{Text: "the registry names an invalid token server"}
	}
	if err := s.trusted(realm); err != nil {
		return "", err
	}
	if s.auth.IdentityToken != "" {
		token, err := s.exchange(ctx, realm)
		var e *Error
		if err == nil || !errors.As(err, &e) || e.Status != http.StatusNotFound && e.Status != http.StatusMethodNotAllowed {
			return token, err
		}
	}
	q := realm.Query()
	q.Set("service", s.service)
	for _, scope := range s.scopes {
		q.Add("scope", scope)
	}
	at := *realm
	at.RawQuery = q.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at.String(), nil)
	if err != nil {
		return "", err
	}
	s.basic(req)
	return s.ask(req)
}

func (s *signing) exchange(ctx context.Context, realm *url.URL) (string, error) {
	form := url.Values{
		"grant_type":    {"refresh_token"},
		"refresh_token": {s.auth.IdentityToken},
		"service":       {s.service},
		"scope":         {strings.Join(s.scopes, " ")},
		"client_id":     {s.agent},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, realm.String(), strings.NewReader(form.Encode()))
	if err != nil {
		return "", err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	return s.ask(req)
}

// ask sends a request to the token server.
func (s *signing) ask(req *http.Request) (string, error) {
	req.Header.Set("User-Agent", s.agent)
	client := http.Client{Transport: s.next, CheckRedirect: func(req *http.Request, via []*http.Request) error {
		if len(via) >= 5 {
			return errors.New("too many redirects")
		}
		return s.trusted(req.URL)
	}}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if err := answered(resp, http.StatusOK); err != nil {
		var e *Error
		if errors.As(err, &e) && e.Class == NotFound { // what is not found is not the image
			return "", &Error{Status: e.Status, Text: "the registry's token server does not answer as one (404)"}
		}
		return "", err
	}
	var answer struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"`
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return "", err
	}
	err = json.Unmarshal(data, &answer)
	if answer.Token == "" {
		answer.Token = answer.AccessToken
	}
	if err != nil || answer.Token == "" {
		return "", &Error{Text: "the registry's token server sent no token"}
	}
	return answer.Token, nil
}

// trusted refuses token servers to which a registry must not send us: ones that would be spoken to in the
// clear, and addresses inside our network if the registry itself is outside (a forged request to a service
// that trusts this machine).
func (s *signing) trusted(u *url.URL) error {
	if u.Scheme != "https" && (u.Scheme != "http" || !s.clear(u.Host)) {
		return fmt.Errorf("token server %s: %w", u.Host, errClear)
	}
	if internal(u.Host) && !internal(s.host) && u.Host != s.host {
		return &Error{Text: fmt.Sprintf("the registry names a token server on an internal address, %s", u.Host)}
	}
	return nil
}

// internal reports whether a host is by its own spelling on this machine or in a private network.
func internal(hostport string) bool {
	if loopback(hostport) {
		return true
	}
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	a, err := netip.ParseAddr(strings.Trim(host, "[]"))
	if err != nil {
		return false
	}
	a = a.Unmap()
	return a.IsPrivate() || a.IsLinkLocalUnicast() || a.IsLinkLocalMulticast() || a.IsUnspecified()
}
