//go:build linux

package config

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"strings"
)

func (t TLS) validate(p *problems) {
	if t.CAFile != "" {
		pem, err := os.ReadFile(t.CAFile)
		if err == nil && !x509.NewCertPool().AppendCertsFromPEM(pem) {
			err = fmt.Errorf("%s holds no certificate: it must be PEM", t.CAFile)
		}
		p.add("TLS_CA_FILE", "%w", err)
	}
	switch {
	case t.CertFile != "" && t.KeyFile == "":
		p.add("TLS_KEY_FILE", "missing beside LEASEHOLD_TLS_CERT_FILE: set both or neither")
	case t.CertFile == "" && t.KeyFile != "":
		p.add("TLS_CERT_FILE", "missing beside LEASEHOLD_TLS_KEY_FILE: set both or neither")
	case t.CertFile != "":
		_, certErr := os.ReadFile(t.CertFile)
		p.add("TLS_CERT_FILE", "%w", certErr)
		_, keyErr := os.ReadFile(t.KeyFile)
		p.add("TLS_KEY_FILE", "%w", keyErr)
		if certErr == nil && keyErr == nil {
			_, err := tls.LoadX509KeyPair(t.CertFile, t.KeyFile)
			p.add("TLS_CERT_FILE", "%w", err)
		}
	}
}

func (c *Config) validateAuth(p *problems) {
	given := c.Password != "" || c.PasswordFile != ""
	switch {
	case c.Username != "" && !given:
		p.add("USERNAME", "set without a password:"+
			" set LEASEHOLD_PASSWORD or LEASEHOLD_PASSWORD_FILE too")
	case c.Username == "" && given:
		p.add("USERNAME", "missing beside the password: set both or neither")
	}
	if c.Password != "" && c.PasswordFile != "" {
		p.add("PASSWORD_FILE", "set together with LEASEHOLD_PASSWORD: unset one of them")
	}
	if c.PasswordFile != "" {
		_, err := c.ReadPassword()
		p.add("PASSWORD_FILE", "%w", err)
	}
}

// ReadPassword returns the password of Username. It reads a password file anew, since files of
// secrets are changed in place.
func (c *Config) ReadPassword() (string, error) {
	if c.PasswordFile == "" {
		return string(c.Password), nil
	}
	text, err := os.ReadFile(c.PasswordFile)
	if err != nil {
		return "", err
	}
	password := strings.TrimSuffix(strings.TrimSuffix(string(text), "\n"), "\r")
	if password == "" {
		return "", fmt.Errorf("%s holds no password", c.PasswordFile)
	}
	return password, nil
}
