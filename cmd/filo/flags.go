package main

import (
	"fmt"
	"time"

	"github.com/spf13/pflag"

	"filo/builder/sandbox"
)

// buildFlags are the flags of build as they were written, in the groups of its help.
type buildFlags struct {
	what    whatFlags
	steps   stepFlags
	results resultFlags
	limits  limitFlags
	show    showFlags
	ignored ignoredFlags
}

// whatFlags say what is built.
type whatFlags struct {
	file      string
	target    string
	args      []string
	argFile   string
	ignore    string // --ignorefile
	labels    []string
	platforms []string
	contexts  []string
	call      string
	check     bool
}

// stepFlags say how steps are done.
type stepFlags struct {
	noCache bool
	filter  []string
	pull    bool
	network string
	hosts   []string
	dns     sandbox.DNS
	longest time.Duration
	secrets []string
	ssh     []string
	shmSize string
	ulimits []string
	allow   []string
	verify  bool
	explain bool
	jobs    int
	keep    string // --keep-storage
}

// resultFlags say where the result goes.
type resultFlags struct {
	tags        []string
	outputs     []string
	push        bool
	load        bool
	annotations []string
	iidfile     string
	metadata    string
	cacheFrom   []string
	cacheTo     []string
	attest      []string
	provenance  string
	sbom        string
}

// showFlags say what is shown meanwhile.
type showFlags struct {
	progress string
	logTime  bool
	quiet    bool
	timings  bool
	trace    string
}

// ignoredFlags are those of docker build that no BuildKit builder obeys. They are accepted, with a warning, so that
// old scripts go on working.
type ignoredFlags struct {
	names []string
}

func (f *buildFlags) register(fs *pflag.FlagSet) {
	fs.SortFlags = false
	f.what.register(fs)
	f.results.register(fs)
	f.steps.register(fs)
	f.limits.register(fs)
	f.show.register(fs)
	f.ignored.register(fs)
}

func (f *whatFlags) register(fs *pflag.FlagSet) {
	fs.StringVarP(&f.file, "file", "f", "", "Dockerfile: a `path`, a URL, or - for standard input (default PATH/Dockerfile)")
	fs.StringVar(&f.target, "target", "", "build this `stage` (default the last one)")
	fs.StringArrayVar(&f.args, "build-arg", nil, "set a build argument: `NAME=VALUE`, or NAME to take it from the environment")
	fs.StringVar(&f.argFile, "build-arg-file", "", "build arguments from a `file`, one a line; --build-arg comes before it")
	fs.StringVar(&f.ignore, "ignorefile", "", "read the patterns of what the local context does not hold from this `file`, not from .dockerignore")
	fs.StringArrayVar(&f.labels, "label", nil, "add a label to the image: `KEY=VALUE`")
	fs.StringArrayVar(&f.platforms, "platform", nil, "build for `OS/ARCH[/VARIANT]`; several (with commas, or repeated) give an index")
	fs.StringArrayVar(&f.contexts, "build-context", nil, "additional context: `NAME=PATH`, URL, docker-image://REF or oci-layout://DIR[:TAG][@DIGEST]")
	fs.StringVar(&f.call, "call", "build", "what to do: `build`, check, outline, targets; \",format=json\" may follow")
	fs.BoolVar(&f.check, "check", false, "same as --call=check")
}

func (f *resultFlags) register(fs *pflag.FlagSet) {
	fs.StringArrayVarP(&f.tags, "tag", "t", nil, "`name` of the image, kept in the local store if there is no other output")
	fs.StringArrayVarP(&f.outputs, "output", "o", nil, "where the result goes: `type=TYPE,dest=PATH,…` of type oci, docker, local, tar, image, registry or cacheonly; a bare path is type=local, - is a tar on standard output")
	fs.BoolVar(&f.push, "push", false, "push the image to the registry its name says: same as -o type=registry")
	fs.BoolVar(&f.load, "load", false, "keep the image in filo's local store (there is no Docker daemon to load into)")
	fs.StringArrayVar(&f.annotations, "annotation", nil, "add an annotation: `[LEVEL[PLATFORM]:]KEY=VALUE`; levels are manifest, index, manifest-descriptor, index-descriptor")
	fs.StringVar(&f.iidfile, "iidfile", "", "write the image ID to a `file`")
	fs.StringVar(&f.metadata, "metadata-file", "", "write digests and names of the result to a `file`, as JSON")
	fs.StringArrayVar(&f.cacheFrom, "cache-from", nil, "take over what other builds made: an image `reference`, or type=registry,ref=REF, type=local,src=DIR, type=s3,bucket=NAME,…; cache-mounts=true fills empty cache mounts of RUN, too; may be repeated")
	fs.StringArrayVar(&f.cacheTo, "cache-to", nil, "share what this build made: a `reference`, or type=registry,ref=REF, type=local,dest=DIR, type=s3,bucket=NAME,…, type=inline; mode=max shares all stages, cache-mounts=true what RUN --mount=type=cache keeps (up to cache-mounts-max=2GB); may be repeated")
	fs.StringArrayVar(&f.attest, "attest", nil, "state how the image was made, beside it: `type=provenance,mode=max` or type=sbom; images have no attestations unless asked for")
	fs.StringVar(&f.provenance, "provenance", "", "same as --attest=type=provenance: `true`, false, or mode=min|max,version=v1|v0.2,builder-id=URI,reproducible=true,inline-only=true (default false)")
	fs.StringVar(&f.sbom, "sbom", "", "same as --attest=type=sbom: `true` lists packages of dpkg, apk, Go programs, npm and Python, generator=IMAGE lets a scanner do it (default false)")
	fs.Lookup("provenance").NoOptDefVal = "true"
	fs.Lookup("sbom").NoOptDefVal = "true"
}

func (f *stepFlags) register(fs *pflag.FlagSet) {
	fs.BoolVar(&f.noCache, "no-cache", false, "do every step anew")
	fs.StringArrayVar(&f.filter, "no-cache-filter", nil, "do the steps of these `stages` anew")
	fs.BoolVar(&f.pull, "pull", false, "ask the registry for every base image, even if the store has one of that name")
	fs.StringVar(&f.network, "network", "default", "network of RUN: default, host or none")
	fs.StringArrayVar(&f.hosts, "add-host", nil, "add a line to /etc/hosts of RUN: `NAME:IP`")
	fs.StringArrayVar(&f.dns.Servers, "dns", nil, "ask the name server at this `IP` in RUN, not those of the machine; may be repeated")
	fs.StringArrayVar(&f.dns.Search, "dns-search", nil, "look for names in this `domain`")
	fs.StringArrayVar(&f.dns.Options, "dns-option", nil, "an `option` of resolv.conf, like timeout:1")
	fs.StringArrayVar(&f.secrets, "secret", nil, "give RUN a secret: `id=NAME[,src=PATH|,env=VARIABLE]`")
	fs.StringArrayVar(&f.ssh, "ssh", nil, "give RUN an ssh agent: `default` or ID[=SOCKET|KEY[,KEY]]")
	fs.StringVar(&f.shmSize, "shm-size", "", "`size` of /dev/shm (default 64m)")
	fs.StringArrayVar(&f.ulimits, "ulimit", nil, "resource limit of RUN: `NAME=SOFT[:HARD]`")
	fs.StringSliceVar(&f.allow, "allow", nil, "allow a step to ask for `network.host` or security.insecure")
	fs.BoolVar(&f.verify, "verify", false, "do steps that the cache has anew and compare: a cache check, not faster")
	fs.BoolVar(&f.explain, "explain", false, "print every input of every cache key")
	fs.DurationVar(&f.longest, "step-timeout", 0, "stop a RUN that takes longer than this `time`, like 10m, and fail")
	fs.IntVarP(&f.jobs, "jobs", "j", 0, "steps done at once (default four for each core)")
	fs.StringVar(&f.keep, "keep-storage", "", "when done, remove from the state directory what was used longest ago until this `size` is left, like 20GB")
}

func (f *showFlags) register(fs *pflag.FlagSet) {
	fs.StringVar(&f.progress, "progress", "", "how progress is shown: auto, plain, ci (plain, each step folded on GitHub or GitLab), tty, quiet or rawjson (default $BUILDKIT_PROGRESS, or auto)")
	fs.BoolVar(&f.logTime, "log-time", false, "begin each line of plain progress with its time (UTC)")
	fs.BoolVar(&f.timings, "timings", false, "show at the end where the time of each step went")
	fs.StringVar(&f.trace, "trace", "", "write where the time went to a `file` for chrome://tracing or ui.perfetto.dev")
	fs.BoolVarP(&f.quiet, "quiet", "q", false, "print nothing but the image ID")
}

func (f *ignoredFlags) register(fs *pflag.FlagSet) {
	bools := []string{"rm", "force-rm", "compress", "squash"}
	values := []string{"security-opt", "cgroup-parent", "builder"}
	for _, name := range bools {
		fs.VarPF(&ignored{to: f, name: name, typ: "bool"}, name, "", "").NoOptDefVal = "true"
	}
	for _, name := range values {
		fs.Var(&ignored{to: f, name: name, typ: "string"}, name, "")
	}
	fs.VarPF(&ignored{to: f, name: "debug", typ: "bool"}, "debug", "D", "").NoOptDefVal = "true"
	for _, name := range append(bools, append(values, "debug")...) {
		fs.Lookup(name).Hidden = true
	}
}

// ignored is the value of an ignored flag: it remembers that the flag was there.
type ignored struct {
	to        *ignoredFlags
	name, typ string
}

func (v *ignored) String() string { return "" }
func (v *ignored) Type() string   { return v.typ }

// Set notes the flag.
func (v *ignored) Set(string) error {
	v.to.names = append(v.to.names, v.name)
	return nil
}

// warnings returns a line for each ignored flag.
func (f *ignoredFlags) warnings() []string {
	var out []string
	for _, name := range f.names {
		out = append(out, fmt.Sprintf("--%s has no effect", name))
	}
	return out
}
