// Package builder turns a Dockerfile into images: it walks stages side by side and skips or does their steps.
// A step is a key, a get, a do and a put: step.go has that. copy.go makes a plan (plan.go) of COPY and ADD from two file
// systems (pick.go), run.go a sandbox process of a RUN, with what mount.go shows it.
//
// It never parses a Dockerfile, knows no wire format, makes no system call and prints nothing: whoever asked gets
// an [Event] for everything that happens.
//
// Start at [Builder].
package builder

import (
	"context"
	"fmt"
	"io/fs"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/semaphore"

	"filo/builder/attest"
	"filo/builder/image"
	"filo/builder/sandbox"
	"filo/builder/sandbox/seccomp"
	"filo/builder/sbom"
	"filo/cache"
	"filo/dockerfile"
	"filo/layer"
	"filo/layer/registry"
)

// Builder builds images on one state directory. All fields but Emit and Jobs are needed; they are not changed by a build.
type Builder struct {
	Store    *layer.Store
	Cache    *cache.Store
	Registry *registry.Client
	Now      func() time.Time // for "created" where no epoch is given
	Emit     func(Event)      // called from several goroutines; nil drops events
	Jobs     int              // steps done at once; 0 is four for each core: many do nothing but wait

	// Recall asks shared caches for what the local one lacks. A layer that it names it has promised to Store.
	// Whatever goes wrong is an absence. nil asks nobody.
	Recall func(ctx context.Context, k cache.Key) (r cache.Record, ok bool)

	// Offer is told of each layer as soon as it is made or found, so that shared caches can begin to take it. nil tells
	// nobody.
	Offer func(ctx context.Context, m Made)

	// Restore fills the empty directory dir with what a cache mount that is not here holds elsewhere, and reports whether
	// it did; else dir is thrown away. nil fills none.
	Restore func(ctx context.Context, m CacheMount, dir string) bool

	// Used is told of each cache mount that a step has been given and may have changed. nil tells nobody.
	Used func(m CacheMount)
}

// Request is one build.
type Request struct {
	File     []byte            // the Dockerfile's text
	FileName string            // as errors show it
	Context  fs.FS             // the build context, ignore file applied; nil is an empty one
	Root     string            // absolute path of Context if it is a local directory: digests of its files are remembered
	Modified *int64            // when Context was made, seconds since the epoch, for SOURCE_DATE_EPOCH=context; nil if nobody can tell
	Ignore   []string          // patterns of the ignore file that Context has applied, for the build checks
	Named    map[string]Named  // --build-context
	Open     Opener            // opens what ADD names by URL; nil refuses URLs
	Target   string            // --target; "" is the last stage
	Args     map[string]string // --build-arg
	Labels   map[string]string // --label

	Platforms     []ocispec.Platform // --platform; empty is the machine's own
	MultiPlatform bool               // names of vertices carry the platform even for a single one

	NoCache       bool
	NoCacheFilter []string // stages whose steps are done anew, in whatever case
	Pull          bool     // ask the registry for every base
	Verify        bool     // do hits again and compare
	Explain       func(vertex, text string)

	Network   string            // for RUN without --network: "default", "host", "none"; "" is default
	Hosts     []string          // --add-host "name:ip"
	DNS       sandbox.DNS       // like the addresses of Hosts in no key
	Secrets   map[string]Secret // --secret by id
	SSH       map[string]Agent  // --ssh by id
	ShmSize   int64             // bytes; 0 is the default
	Ulimits   []sandbox.Ulimit
	Limits    sandbox.Limits
	Longest   time.Duration      // that the process of a RUN may take; 0 is any time
	Scan      *attest.Scanner    // scans the result; nil for none
	Title     sbom.Subject       // what an SBOM calls the result and who makes it
	Allow     []string           // entitlements: "network.host", "security.insecure"
	Epoch     *int64             // SOURCE_DATE_EPOCH: pins "created" and clamps file times
	KeepTimes bool               // files keep their times whatever Epoch says, and steps are found again with another one
	Ships     *layer.Compression // how layers of the result leave the store; nil if no layer leaves (type=local, type=tar, no output)
	Ground    sandbox.Ground     // where steps run
	SingleID  bool               // the sandbox has one user id only
}

// Named is the value of a --build-context: exactly one field is set.
type Named struct {
	FS       fs.FS                                                               // files
	Root     string                                                              // of FS, as in Request
	Modified *int64                                                              // of FS, as in Request
	Image    func(ctx context.Context, p ocispec.Platform) (*image.Image, error) // an image: docker-image://, oci-layout://
	Text     string                                                              // what the user wrote, for progress
}

// Fetched is the content of a URL.
type Fetched struct {
	FS       fs.FS  // one file (http), or a tree (git)
	Name     string // base name of the one file; "" for a tree
	Identity string // what names the content: a body's digest, a commit with what was taken of it
	Commit   string // of a git repository; "" for everything else
	Modified *int64 // Last-Modified, or the time of the commit; seconds since the epoch, nil if unknown
	Close    func() error
}

// Opener fetches the URL of an ADD. checksum and keepGit are ADD's flags.
type Opener func(ctx context.Context, url, checksum string, keepGit *bool) (Fetched, error)

// Secret gives the bytes of a secret when a step needs them.
type Secret func() ([]byte, error)

// Agent connects to an ssh agent.
type Agent func(ctx context.Context) (net.Conn, error)

// Result is what a build made.
type Result struct {
	Images   []*image.Image // one a platform, in the order asked for
	Warnings []dockerfile.Warning
	Made     []Made               // what each step made or found, for shared caches; bases first, each key once
	Scans    [][]attest.Statement // what the scanner found in each image
	Epoch    *int64               // SOURCE_DATE_EPOCH as it was found; nil if times are real
	Records  []attest.Record      // what went into each image
}

// Made is a layer and the key it can be found under.
type Made struct {
	Key     cache.Key
	Layer   layer.Layer
	Created int64 // seconds since the epoch
	Shipped bool  // the layer is one of the result's
}

// State is what happened to a vertex.
type State int

// The states of a vertex. Started comes first, one of Cached, Done, Failed, Canceled last.
const (
	Started State = iota
	Cached
	Done
	Failed
	Canceled
	Log
	Warned
	Entered // a phase begins; it may come before Started or end after the vertex did
	Left    // and ends
	Moving  // some bytes of something came
	Moved   // all of them
)

// The phases of a vertex.
const (
	Keying      = "key"      // finds what a step reads and asks the cache
	Waiting     = "wait"     // for another build that does the same, or for other steps to end
	Unpacking   = "unpack"   // makes the layers below ready for a process
	Running     = "run"      // the process
	Snapshoting = "snapshot" // makes a layer of what the process changed
	Copying     = "copy"     // makes a layer of files
	Compressing = "compress" // makes the blob of a layer, mostly while later steps run
)

// Event is one piece of news about a vertex. It carries no time: who draws it knows when it came.
type Event struct {
	Vertex int    // from 1, in the order of Started
	Name   string // `[stage 2/5] RUN apt-get update`
	State  State
	Stream int    // Log: 1 for standard output, 2 for standard error
	Data   []byte // Log, Warned: the text; Entered, Left: the phase; Moving, Moved: what moves
	Bytes  int64  // Moving, Moved: how much of it came
	Of     int64  // and how much there is
	Err    error  // Failed
}

// Build builds req's target for every platform asked for. The error of a failed step is a [*dockerfile.Error] that
// knows the step's lines.
func (b *Builder) Build(ctx context.Context, req Request) (Result, error) {
	jobs := b.Jobs
	if jobs == 0 {
		jobs = 4 * runtime.GOMAXPROCS(0)
	}
	bd := &build{
		Builder: b, req: req, jobs: semaphore.NewWeighted(int64(jobs)), runner: sandbox.Runner{Filter: seccomp.Docker},
		bases: newOnce[baseKey, *image.Image](), files: newOnce[string, *cache.Files](), steps: newOnce[cache.Key, memory](),
		trial: newTrial(ctx),
	}
	defer bd.runner.Close()
	defer bd.trial.stop(nil)
	return bd.run(bd.trial.ctx)
}

// build is the state of one Build.
type build struct {
	*Builder
	req         Request
	jobs        *semaphore.Weighted
	vertices    atomic.Int32
	bases       *once[baseKey, *image.Image]
	files       *once[string, *cache.Files] // by directory
	steps       *once[cache.Key, memory]    // what steps made in this build
	made        madeList
	cacheMounts sync.Map // directories of those used by this build
	runner      sandbox.Runner
	trial       *trial
}

// vertex is one line of progress.
type vertex struct {
	b    *build
	id   int
	name string
}

// start announces a new vertex.
func (b *build) start(format string, args ...any) *vertex {
	v := b.vertex(fmt.Sprintf(format, args...))
	v.emit(Event{State: Started})
	return v
}

// vertex makes a vertex that is not announced yet.
func (b *build) vertex(name string) *vertex {
	return &vertex{b: b, id: int(b.vertices.Add(1)), name: name}
}

// phase tells that a phase of v begins, and the returned function that it ends. A nil vertex tells nothing.
func (v *vertex) phase(name string) (leave func()) {
	if v == nil {
		return func() {}
	}
	v.emit(Event{State: Entered, Data: []byte(name)})
	return func() { v.emit(Event{State: Left, Data: []byte(name)}) }
}

func (v *vertex) emit(e Event) {
	if v.b.Emit == nil {
		return
	}
	e.Vertex, e.Name = v.id, v.name
	v.b.Emit(e)
}

// end announces how the vertex ended and returns err.
func (v *vertex) end(ctx context.Context, err error) error {
	switch {
	case err == nil:
		v.emit(Event{State: Done})
	case ctx.Err() != nil:
		v.emit(Event{State: Canceled})
	default:
		v.emit(Event{State: Failed, Err: err})
	}
	return err
}

// warn tells of something that is wrong and does not matter to the result.
func (b *build) warn(format string, args ...any) {
	if b.Emit != nil {
		b.Emit(Event{State: Warned, Data: fmt.Appendf(nil, format, args...)})
	}
}

// output is the stream of a vertex's log.
type output struct {
	v      *vertex
	stream int
}

// Write passes p on as a Log event.
func (o output) Write(p []byte) (int, error) {
	o.v.emit(Event{State: Log, Stream: o.stream, Data: append([]byte(nil), p...)})
	return len(p), nil
}
