package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestEndToEnd builds real things on a Debian base: a web server from its packages, as root and rootless with the same
// digest, and this project from source. It needs root, debootstrap, a Debian mirror and the module proxy, and some
// minutes, so it runs only where FILO_E2E is set.
func TestEndToEnd(t *testing.T) {
	if os.Getenv("FILO_E2E") == "" {
		t.Skip("FILO_E2E is not set")
	}
	needGround(t)
	e := &endToEnd{T: t, dir: t.TempDir(), host: startRegistry(t)}
	t.Cleanup(func() { sweepState(e.state("root")); sweepState(e.state("rootless")) })
	e.debian()
	t.Run("web server", e.webServer)
	t.Run("this project", e.thisProject)
}

// endToEnd is what the steps of the test share.
type endToEnd struct {
	*testing.T
	dir, host string
}

func (e *endToEnd) state(isolation string) string { return filepath.Join(e.dir, "state-"+isolation) }

// filo runs filo on a ground and returns what it printed on standard error.
func (e *endToEnd) filo(t *testing.T, isolation string, args ...string) string {
	t.Helper()
	cmd := filo(e.state(isolation), append([]string{"--isolation", isolation}, args...)...)
	cmd.Env = append(cmd.Env, "FILO_REGISTRY_MIRRORS=docker.io="+e.host)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("filo %q: %v\n%s", args, err, out)
	}
	return string(out)
}

// write makes files below the test's directory: name, content, name, content, …
func (e *endToEnd) write(t *testing.T, files ...string) {
	t.Helper()
	for i := 0; i < len(files); i += 2 {
		path := filepath.Join(e.dir, files[i])
		if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(files[i+1]), 0o666); err != nil {
			t.Fatal(err)
		}
	}
}

// debian pushes library/debian:bookworm, made by debootstrap, to the registry.
func (e *endToEnd) debian() {
	if os.Geteuid() != 0 {
		e.Skip("debootstrap needs root")
	}
	if _, err := exec.LookPath("debootstrap"); err != nil {
		e.Skip(err)
	}
	root := filepath.Join(e.dir, "debian")
	if out, err := exec.Command("debootstrap", "--variant=minbase", "bookworm", root).CombinedOutput(); err != nil {
		e.Skipf("no Debian to be had: %v\n%s", err, out)
	}
	e.write(e.T, "base/Dockerfile", "FROM scratch\nADD debian.tar /\nCMD [\"bash\"]\n")
	if out, err := exec.Command("tar", "-C", root, "--numeric-owner", "-cf", filepath.Join(e.dir, "base", "debian.tar"), ".").CombinedOutput(); err != nil {
		e.Fatalf("tar: %v\n%s", err, out)
	}
	e.filo(e.T, "root", "build", "--push", "-t", e.host+"/library/debian:bookworm", filepath.Join(e.dir, "base"))
}

const webDockerfile = `FROM debian:bookworm AS site
WORKDIR /site
COPY site .
RUN sed -i s/hi/hello/ index.html
FROM debian:bookworm
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends nginx-light \
 && rm -rf /var/lib/apt/lists/* /var/log/* /var/cache/apt/* /var/cache/ldconfig/aux-cache /var/cache/debconf/*-old /var/lib/dpkg/*-old
COPY --from=site /site /var/www/html
EXPOSE 80
CMD ["nginx", "-g", "daemon off;"]
`

// webServer installs a server with apt-get, as root and rootless, and compares.
func (e *endToEnd) webServer(t *testing.T) {
	e.write(t, "web/Dockerfile", webDockerfile, "web/site/index.html", "<h1>hi</h1>\n")
	var digests []string
	for _, isolation := range []string{"root", "rootless"} {
		out := filepath.Join(e.dir, "web-"+isolation)
		build := []string{"build", "--progress", "plain", "--build-arg", "SOURCE_DATE_EPOCH=1700000000", "-o", "type=oci,tar=false,dest=" + out, filepath.Join(e.dir, "web")}
		e.filo(t, isolation, build...)
		log := e.filo(t, isolation, build...)
		if !strings.Contains(log, "5 of 5 steps cached") {
			t.Errorf("%s: the second build is not cached:\n%s", isolation, log)
		}
		index, err := os.ReadFile(filepath.Join(out, "index.json"))
		if err != nil {
			t.Fatal(err)
		}
		digests = append(digests, string(index))
	}
	if digests[0] != digests[1] {
		t.Errorf("as root\n%s\nrootless\n%s", digests[0], digests[1])
	}
	e.filo(t, "root", "build", "--build-arg", "SOURCE_DATE_EPOCH=1700000000", "-o", filepath.Join(e.dir, "files"), filepath.Join(e.dir, "web"))
	page, err := os.ReadFile(filepath.Join(e.dir, "files", "var/www/html/index.html"))
	if err != nil || string(page) != "<h1>hello</h1>\n" {
		t.Errorf("the page is %q, %v", page, err)
	}
	if _, err := os.Stat(filepath.Join(e.dir, "files", "usr/sbin/nginx")); err != nil {
		t.Error(err)
	}
	e.filo(t, "root", "build", "--build-arg", "SOURCE_DATE_EPOCH=1700000000", "--push", "-t", e.host+"/web:1", filepath.Join(e.dir, "web"))
	e.podman(t, e.host+"/web:1")
}

// podman pulls the image and lets the server speak, as far as podman can run anything here.
func (e *endToEnd) podman(t *testing.T, image string) {
	if _, err := exec.LookPath("podman"); err != nil {
		t.Log(err)
		return
	}
	podman := func(args ...string) (string, error) {
		args = append([]string{"--storage-driver=vfs", "--root", filepath.Join(e.dir, "podman"), "--runroot", filepath.Join(e.dir, "podman-run")}, args...)
		out, err := exec.Command("podman", args...).CombinedOutput()
		return string(out), err
	}
	if out, err := podman("pull", "-q", "--tls-verify=false", image); err != nil {
		t.Errorf("podman pull: %v\n%s", err, out)
	}
	out, err := podman("run", "--rm", "--network=none", "--cgroups=disabled", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1000:1000", image, "nginx", "-v")
	switch {
	case err != nil && (strings.Contains(out, "OCI") || strings.Contains(out, "crun") || strings.Contains(out, "runc")):
		t.Logf("podman runs nothing on this machine: %s", out)
	case err != nil || !strings.Contains(out, "nginx version"):
		t.Errorf("podman run: %v\n%s", err, out)
	}
}

const selfDockerfile = `FROM debian:bookworm AS build
ENV SSL_CERT_DIR=/certs
WORKDIR /src
COPY go.mod go.sum ./
RUN --mount=type=bind,from=go,target=/usr/local/go --mount=type=bind,from=certs,target=/certs --mount=type=cache,target=/root/go /usr/local/go/bin/go mod download
COPY . .
RUN --mount=type=bind,from=go,target=/usr/local/go --mount=type=cache,target=/root/go --mount=type=cache,target=/root/.cache \
    CGO_ENABLED=0 /usr/local/go/bin/go build -trimpath -buildvcs=false -o /filo ./cmd/filo
FROM scratch
COPY --from=build /filo /filo
ENTRYPOINT ["/filo"]
`

// thisProject compiles filo and runs what comes out.
func (e *endToEnd) thisProject(t *testing.T) {
	e.write(t, "Dockerfile.self", selfDockerfile, "Dockerfile.self.dockerignore", ".git\n.demo\nfilo\nbin\n")
	out := filepath.Join(e.dir, "self")
	env, err := exec.Command("go", "env", "GOPROXY", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	proxy, root, _ := strings.Cut(strings.TrimSpace(string(env)), "\n")
	e.filo(t, "root", "build", "-f", filepath.Join(e.dir, "Dockerfile.self"), "--build-context", "go="+root, "--build-context", "certs=/etc/ssl/certs",
		"--build-arg", "GOPROXY="+proxy, "-o", out, filepath.Join("..", ".."))
	version, err := exec.Command(filepath.Join(out, "filo"), "version").CombinedOutput()
	if err != nil || !strings.HasPrefix(string(version), "filo ") {
		t.Errorf("what was built says %q, %v", version, err)
	}
	if n, err := filepath.Glob(filepath.Join(out, "*")); err != nil || len(n) != 1 {
		t.Errorf("the result holds %s, want one file", fmt.Sprint(n))
	}
}
