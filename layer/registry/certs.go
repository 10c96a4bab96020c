package registry

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
)

// certDirs is where Docker and Podman keep what a host needs beside the system's certificates: a directory
// for each HOST[:PORT] with authorities in *.crt and client certificates in NAME.cert with NAME.key.
var certDirs = []string{"/etc/docker/certs.d", "/etc/containers/certs.d"}

// via returns the transport for a host: one that trusts what is configured for it.
func (t *retrying) via(host string) (http.RoundTripper, error) {
	if t.plain[host] || t.hosts[host].plain {
		return t.lax, nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if rt := t.own[host]; rt != nil {
		return rt, nil
	}
	rt := t.strict
	config, err := hostTLS(t.certs, host)
	if err == nil {
		config, err = t.hosts[host].added(config)
	}
	if err != nil {
		return nil, err
	}
	if config != nil {
		rt = t.strict.Clone()
		rt.TLSClientConfig = config
	}
	t.own[host] = rt
	return rt, nil
}

// hostTLS reads what is configured for a host; nil if nothing is.
func hostTLS(dirs []string, host string) (*tls.Config, error) {
	if host == "" || strings.ContainsAny(host, `/\`) || host == "." || host == ".." {
		return nil, nil
	}
	var config *tls.Config
	for _, dir := range dirs {
		list, err := os.ReadDir(filepath.Join(dir, host))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("certificates for %s: %w", host, err)
		}
		for _, f := range list {
			if config == nil {
				config = &tls.Config{MinVersion: tls.VersionTLS12}
			}
			if err := addCert(config, filepath.Join(dir, host, f.Name())); err != nil {
				return nil, fmt.Errorf("certificates for %s: %w", host, err)
			}
		}
	}
	return config, nil
}

func addCert(c *tls.Config, file string) error {
	switch filepath.Ext(file) {
	case ".crt":
		return addAuthority(c, file)
	case ".cert":
		pair, err := tls.LoadX509KeyPair(file, strings.TrimSuffix(file, ".cert")+".key")
		if err != nil {
			return err
		}
		c.Certificates = append(c.Certificates, pair)
	}
	return nil
}

func addAuthority(c *tls.Config, file string) error {
	pem, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if c.RootCAs == nil {
		if c.RootCAs, err = x509.SystemCertPool(); err != nil {
			c.RootCAs = x509.NewCertPool()
		}
	}
	if !c.RootCAs.AppendCertsFromPEM(pem) {
		return fmt.Errorf("no certificate in %s", file)
	}
	return nil
}

// added returns a configuration, which may be nil, with what t says.
func (t trust) added(c *tls.Config) (*tls.Config, error) {
	if len(t.ca)+len(t.client) == 0 && !t.lax {
		return c, nil
	}
	if c == nil {
		c = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	c.InsecureSkipVerify = t.lax
	for _, file := range t.ca {
		if err := addAuthority(c, file); err != nil {
			return nil, err
		}
	}
	for _, p := range t.client {
		pair, err := tls.LoadX509KeyPair(p[0], p[1])
		if err != nil {
			return nil, err
		}
		c.Certificates = append(c.Certificates, pair)
	}
	return c, nil
}
