package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// work is something to build, in one case after the other.
type work struct {
	name   string
	cases  []string
	make   func(*inputsOf) (*job, error)
	wanted map[string]float64 // ratio to BuildKit that filo is to reach, by case
	alone  bool               // filo alone does it, once: it is there for the memory
}

// job is a work with its inputs made.
type job struct {
	context string
	file    string                           // Dockerfile
	warm    string                           // Dockerfile that makes a builder pull and unpack the base; "" measures that as well
	push    string                           // name to push to; "" writes an OCI layout
	prepare map[string]func(round int) error // before a case
	floor   map[string]func() time.Duration  // of a case
	list    func(k task, to string) (string, error)
	asked   func() int // requests to the registry so far; nil does not count them
}

func (j *job) requests() int {
	if j.asked == nil {
		return 0
	}
	return j.asked()
}

// The cases.
const (
	cold    = "cold"
	cached  = "cached"
	changed = "one changed"
)

// works are in an order in which those of many processes come before those of many files.
func works() []work {
	type want = map[string]float64
	runs := func(base string, n int) func(*inputsOf) (*job, error) {
		return func(in *inputsOf) (*job, error) { return in.runs(base, in.few(n)) }
	}
	return []work{
		{name: "30 RUN", cases: []string{cold, cached}, make: runs("small", 30), wanted: want{cold: 8, cached: 6}},
		{name: "10 RUN on busybox", cases: []string{cold}, make: runs("small", 10)},
		{name: "10 RUN up to 120 layers", cases: []string{cold}, make: runs("deep", 10)},
		{name: "10 RUN on 300,000 files", cases: []string{cold}, make: runs("many", 10)},
		{name: "3 stages", cases: []string{cold}, make: (*inputsOf).stages},
		{name: "push unchanged", cases: []string{cold, cached}, make: (*inputsOf).pushing},
		{name: "RUN writing 15,000 files", cases: []string{cold}, make: (*inputsOf).writing, wanted: want{cold: 3}},
		{name: "RUN copying 15,000 files", cases: []string{cold}, make: (*inputsOf).copying, wanted: want{cold: 3}},
		{name: "pull 200 MB", cases: []string{cold}, make: (*inputsOf).pull, wanted: want{cold: 2}},
		{name: "30 RUN on 200 MB", cases: []string{cold, cached}, make: runs("heavy", 30), wanted: want{cold: 8, cached: 6}},
		{name: "COPY 30,000 files", cases: []string{cold, cached, changed}, make: (*inputsOf).files, wanted: want{cold: 6, cached: 12, changed: 8}},
		{name: "COPY 1 GiB", cases: []string{cold, cached}, make: (*inputsOf).big, wanted: want{cold: 6, cached: 50}},
		{name: "COPY 8 GiB", cases: []string{cold}, make: (*inputsOf).huge, alone: true},
	}
}

// inputsOf makes inputs and bases at a scale, each once.
type inputsOf struct {
	dir      string
	scale    float64
	registry *registry
}

// scaled is n at the scale, at least 1.
func (in *inputsOf) scaled(n int) int { return max(1, int(float64(n)*in.scale)) }

// few is n, or a third of it where the scale asks for a quick run.
func (in *inputsOf) few(n int) int {
	if in.scale < 0.1 {
		return n / 3
	}
	return n
}

// once makes the directory name, unless it was made before.
func (in *inputsOf) once(name string, fill func(dir string) error) (string, error) {
	dir := filepath.Join(in.dir, name)
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	tmp := dir + ".tmp"
	if err := errors.Join(os.RemoveAll(tmp), os.MkdirAll(tmp, 0o755)); err != nil {
		return "", err
	}
	if err := fill(tmp); err != nil {
		return "", err
	}
	return dir, os.Rename(tmp, dir)
}

// base puts a base image into the registry, unless it is there, and returns its name.
func (in *inputsOf) base(name string) (string, error) {
	ref := in.registry.Host + "/" + name + ":latest"
	if _, err := in.registry.tagged(name, "latest"); err == nil {
		return ref, nil
	}
	first, err := shell(in.dir)
	if err != nil {
		return "", err
	}
	layers := []*layerTar{first}
	more := func(fill func(l *layerTar) error) {
		l := newLayerTar()
		err = errors.Join(err, fill(l))
		layers = append(layers, l)
	}
	switch name {
	case "many":
		more(func(l *layerTar) error { return fileTree(l, "usr/many", in.scaled(300_000), 20) })
	case "deep":
		for i := range 109 {
			more(func(l *layerTar) error {
				return errors.Join(l.dir("var", 0o755), l.file(fmt.Sprintf("var/layer%d", i), 0o644, []byte("x")))
			})
		}
	case "sources":
		more(func(l *layerTar) error { return fileTree(l, "usr/sources", in.scaled(15_000), 6_700) })
	case "heavy":
		for i := range 4 {
			more(func(l *layerTar) error { return fileTree(l, fmt.Sprintf("usr/heavy%d", i), in.scaled(2000), 25_000) })
		}
	}
	if err != nil {
		return "", err
	}
	return ref, in.registry.putImage(name, layers)
}

// fileTree puts n files of about size bytes below dir, a hundred in a directory.
func fileTree(l *layerTar, dir string, n, size int) error {
	err := errors.Join(l.dir("usr", 0o755), l.dir(dir, 0o755))
	for i := range n {
		sub := fmt.Sprintf("%s/d%d", dir, i/100)
		if i%100 == 0 {
			err = errors.Join(err, l.dir(sub, 0o755))
		}
		err = errors.Join(err, l.file(fmt.Sprintf("%s/f%d", sub, i), 0o644, text(uint64(i), size)))
	}
	return err
}

// text is n bytes that compress about as well as source code, always the same for a seed.
func text(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, 0, n+16)
	for len(b) < n {
		b = fmt.Appendf(b, "%s%d ", words[r.IntN(len(words))], r.IntN(3000))
		if r.IntN(12) == 0 {
			b = append(b, '\n')
		}
	}
	return b[:n]
}

var words = strings.Fields(`the return of layer func if err nil string range package import for type struct var const case
switch break continue default go select interface map chan defer goto else error context value name path size mode`)

// dockerfile writes one beside the context and returns its path. Names of bases come with the registry's port, which
// changes from run to run.
func (in *inputsOf) dockerfile(name, text string) (string, error) {
	dir := filepath.Join(in.dir, "dockerfiles")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	path := filepath.Join(dir, name)
	return path, os.WriteFile(path, []byte(text), 0o644)
}

// job makes the job of a Dockerfile on a base. What is in it of "%s" is the base's name.
func (in *inputsOf) job(name, base, context, text string) (*job, error) {
	ref, err := in.base(base)
	if err != nil {
		return nil, err
	}
	j := &job{context: context, list: listLayout}
	if j.file, err = in.dockerfile(name, fmt.Sprintf(text, ref)); err != nil {
		return nil, err
	}
	j.warm, err = in.dockerfile(name+".warm", fmt.Sprintf("FROM %s\nRUN true\n", ref))
	return j, err
}

func (in *inputsOf) empty() (string, error) {
	return in.once("empty", func(string) error { return nil })
}

func (in *inputsOf) runs(base string, n int) (*job, error) {
	dir, err := in.empty()
	if err != nil {
		return nil, err
	}
	text := "FROM %s\n"
	for i := range n {
		text += fmt.Sprintf("RUN echo %d > /file%d\n", i, i)
	}
	j, err := in.job(fmt.Sprintf("runs%d-%s", n, base), base, dir, text)
	if err != nil {
		return nil, err
	}
	j.floor = map[string]func() time.Duration{cold: func() time.Duration { return floorRun(in.dir) * time.Duration(n) }}
	return j, nil
}

func (in *inputsOf) files() (*job, error) {
	n := in.scaled(30_000)
	dir, err := in.once("files", func(dir string) error {
		for i := range n {
			sub := filepath.Join(dir, fmt.Sprintf("a%d/b%d", i/2000, i/100))
			if i%100 == 0 {
				if err := os.MkdirAll(sub, 0o755); err != nil {
					return err
				}
			}
			if err := os.WriteFile(filepath.Join(sub, fmt.Sprintf("file%d.txt", i)), text(uint64(i), 6700), 0o644); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	j, err := in.job("files", "small", dir, "FROM %s\nCOPY . /src/\n")
	if err != nil {
		return nil, err
	}
	one := filepath.Join(dir, "a0", "b0", "file7.txt")
	j.prepare = map[string]func(int) error{
		cold:    func(int) error { return os.WriteFile(one, text(7, 6700), 0o644) },
		changed: func(round int) error { return os.WriteFile(one, fmt.Appendf(nil, "changed in round %d", round), 0o644) },
	}
	j.floor = map[string]func() time.Duration{
		cold:   func() time.Duration { return floorCopy(dir) },
		cached: func() time.Duration { return floorWalk(dir) },
	}
	return j, nil
}

func (in *inputsOf) big() (*job, error) {
	n := in.scaled(1 << 30)
	dir, err := in.once("big", func(dir string) error {
		f, err := os.Create(filepath.Join(dir, "big"))
		if err != nil {
			return err
		}
		r := rand.NewChaCha8([32]byte{1})
		noise := make([]byte, 64<<10)
		for at := 0; at < n; at += 128 << 10 { // half of it compresses
			r.Read(noise)
			if _, err := f.Write(append(text(uint64(at), 64<<10), noise...)); err != nil {
				return err
			}
		}
		return f.Close()
	})
	if err != nil {
		return nil, err
	}
	j, err := in.job("big", "small", dir, "FROM %s\nCOPY big /big\n")
	if err != nil {
		return nil, err
	}
	j.floor = map[string]func() time.Duration{cold: func() time.Duration { return floorCopy(dir) }}
	return j, nil
}

// huge is a file of which only the holes count: what filo does with them depends on their length.
func (in *inputsOf) huge() (*job, error) {
	dir, err := in.once("huge", func(dir string) error {
		path := filepath.Join(dir, "huge")
		return errors.Join(os.WriteFile(path, nil, 0o644), os.Truncate(path, int64(in.scaled(8<<30))))
	})
	if err != nil {
		return nil, err
	}
	return in.job("huge", "small", dir, "FROM %s\nCOPY huge /huge\n")
}

// writing is of files that are next to nothing, by a shell, which takes half of the time.
func (in *inputsOf) writing() (*job, error) {
	dir, err := in.empty()
	if err != nil {
		return nil, err
	}
	const script = `i=0; while [ $i -lt %d ]; do if [ $((i %% 100)) = 0 ]; then d=/out/d$i; mkdir -p $d; fi; echo content of file $i > $d/f$i; i=$((i+1)); done`
	run := fmt.Sprintf(script, in.scaled(15_000))
	j, err := in.job("writing", "small", dir, "FROM %s\nRUN "+strings.ReplaceAll(run, "%", "%%")+"\n")
	if err == nil {
		j.floor = map[string]func() time.Duration{cold: func() time.Duration { return floorScript(in.dir, run) }}
	}
	return j, err
}

// copying writes files as big as those of a project by a program that does nothing else, as installers do.
func (in *inputsOf) copying() (*job, error) {
	dir, err := in.empty()
	if err != nil {
		return nil, err
	}
	return in.job("copying", "sources", dir, "FROM %s\nRUN cp -r /usr/sources /out\n")
}

func (in *inputsOf) pull() (*job, error) {
	dir, err := in.empty()
	if err != nil {
		return nil, err
	}
	j, err := in.job("pull", "heavy", dir, "FROM %s\nRUN echo > /done\n")
	if err != nil {
		return nil, err
	}
	digest, err := in.registry.tagged("heavy", "latest")
	if err != nil {
		return nil, err
	}
	j.warm = ""
	j.floor = map[string]func() time.Duration{cold: func() time.Duration { return floorPull(in.registry.dir, digest, in.dir) }}
	return j, nil
}

func (in *inputsOf) stages() (*job, error) {
	dir, err := in.empty()
	if err != nil {
		return nil, err
	}
	const text = `FROM %[1]s AS a
RUN sleep 1 && echo a > /a
FROM %[1]s AS b
RUN sleep 1 && echo b > /b
FROM %[1]s AS c
RUN sleep 1 && echo c > /c
FROM %[1]s
COPY --from=a /a /
COPY --from=b /b /
COPY --from=c /c /
`
	j, err := in.job("stages", "small", dir, text)
	if err != nil {
		return nil, err
	}
	j.floor = map[string]func() time.Duration{cold: func() time.Duration { return time.Second }}
	return j, nil
}

func (in *inputsOf) pushing() (*job, error) {
	j, err := in.runs("small", 10)
	if err != nil {
		return nil, err
	}
	j.push, j.floor = in.registry.Host+"/pushed/image", nil
	j.asked = func() int { return int(in.registry.requests.Load()) }
	j.list = func(k task, to string) (string, error) {
		name := strings.TrimPrefix(k.push, in.registry.Host+"/")
		digest, err := in.registry.tagged(name, "latest")
		if err != nil {
			return "", err
		}
		return list(in.registry.dir, digest, to)
	}
	return j, nil
}
