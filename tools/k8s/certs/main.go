// Certs writes the certificates of the etcd in k8s/etcd: an authority, and from it one certificate
// for etcd as a server, one for its members among themselves, and one for clients. Run again, it
// renews these three and keeps the authority, so that nothing that runs has to be stopped for it.
package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

const (
	day           = 24 * time.Hour
	authorityLife = 3650 * day
	leafLife      = 365 * day
)

func main() {
	dir := flag.String("dir", "", "where to write")
	namespace := flag.String("namespace", "default",
		"the Kubernetes namespace that etcd will be in, for clients in other ones")
	flag.Parse()
	if *dir == "" || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(64)
	}
	if err := write(*dir, *namespace); err != nil {
		fmt.Fprintf(os.Stderr, "write certificates: %v\n", err)
		os.Exit(1)
	}
}

func write(dir, namespace string) error {
	ca, key, err := authority(dir)
	if err != nil {
		return err
	}
	// The names of the members in their own namespace are what peers and clients there use.
	var members, all []string
	for i := range 3 {
		members = append(members, fmt.Sprintf("etcd-%d.etcd", i))
	}
	for _, name := range append([]string{"etcd"}, members...) {
		full := name + "." + namespace
		all = append(all, name, full, full+".svc", full+".svc.cluster.local")
	}
	both := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	for _, leaf := range []struct {
		file string
		cert x509.Certificate
	}{
		// etcd is a client of itself, too.
		{"server", x509.Certificate{
			Subject: pkix.Name{CommonName: "etcd-server"}, ExtKeyUsage: both,
			DNSNames: append(all, "localhost"), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		}},
		// A member looks these up to see if a peer that connects may have them.
		{"peer", x509.Certificate{
			Subject: pkix.Name{CommonName: "etcd-peer"}, ExtKeyUsage: both, DNSNames: members,
		}},
		{"client", x509.Certificate{
			Subject: pkix.Name{CommonName: "leasehold"}, ExtKeyUsage: both[1:],
		}},
	} {
		leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		leaf.cert.KeyUsage = x509.KeyUsageDigitalSignature
		path := filepath.Join(dir, leaf.file)
		if err := sign(path, &leaf.cert, leafLife, ca, leafKey, key); err != nil {
			return err
		}
	}
	return nil
}

// authority reads the authority that is there, or makes one.
func authority(dir string) (*x509.Certificate, crypto.Signer, error) {
	path := filepath.Join(dir, "ca")
	pair, err := read(path)
	switch {
	case err == nil:
		if time.Until(pair.cert.NotAfter) < leafLife {
			return nil, nil, fmt.Errorf("%s.crt ends within a year, "+
				"and a new authority is not trusted by what runs: "+
				"remove ca.crt and ca.key to make one, and restart etcd and all clients with it",
				path)
		}
		return pair.cert, pair.key, nil
	case !errors.Is(err, fs.ErrNotExist):
		return nil, nil, err
	}
	for _, file := range []string{path + ".crt", path + ".key"} {
		if _, err := os.Stat(file); err == nil {
			return nil, nil, fmt.Errorf("%s is there without its other half: "+
				"bring that, or remove this", file)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	cert := &x509.Certificate{
		Subject: pkix.Name{CommonName: "etcd-ca"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign,
	}
	if err := sign(path, cert, authorityLife, cert, key, key); err != nil {
		return nil, nil, err
	}
	pair, err = read(path)
	return pair.cert, pair.key, err
}

type pair struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func read(path string) (pair, error) {
	certPEM, certErr := os.ReadFile(path + ".crt")
	keyPEM, keyErr := os.ReadFile(path + ".key")
	if err := errors.Join(certErr, keyErr); err != nil {
		return pair{}, err
	}
	certBlock, _ := pem.Decode(certPEM)
	keyBlock, _ := pem.Decode(keyPEM)
	if certBlock == nil || keyBlock == nil {
		return pair{}, fmt.Errorf("%s.crt or %s.key is not PEM", path, path)
	}
	cert, certErr := x509.ParseCertificate(certBlock.Bytes)
	key, keyErr := x509.ParsePKCS8PrivateKey(keyBlock.Bytes)
	signer, ok := key.(crypto.Signer)
	if err := errors.Join(certErr, keyErr); err != nil || !ok {
		return pair{}, fmt.Errorf("read %s.crt and %s.key: %w", path, path, err)
	}
	return pair{cert, signer}, nil
}

// sign writes a certificate and its key. The key is for nobody else to read.
func sign(
	path string, cert *x509.Certificate, life time.Duration,
	parent *x509.Certificate, key, parentKey crypto.Signer,
) error {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return err
	}
	cert.SerialNumber = serial
	// The clocks of the nodes may be behind.
	cert.NotBefore = time.Now().Add(-time.Hour)
	cert.NotAfter = time.Now().Add(life)
	der, err := x509.CreateCertificate(rand.Reader, cert, parent, key.Public(), parentKey)
	if err != nil {
		return err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	if err := replace(path+".key", "PRIVATE KEY", keyDER, 0o600); err != nil {
		return err
	}
	return replace(path+".crt", "CERTIFICATE", der, 0o644)
}

func replace(path, kind string, der []byte, mode fs.FileMode) error {
	data := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	if err := os.WriteFile(path+".new", data, mode); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
