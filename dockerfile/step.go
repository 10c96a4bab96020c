package dockerfile

import (
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
)

// Config is the image config as it stands after a step, and what of a stage's state is not in the image.
// It is a value: [Stage.Steps] never changes the one it was given.
type Config struct {
	dockerspec.DockerOCIImageConfig        // what the image's "config" object holds (OCI image spec, config.md; Docker's extensions)
	Author                          string // the image's "author" (MAINTAINER)
	Args                            []Arg  // build arguments in scope, each once, in the order of declaration; inherited by a stage FROM this one

	workdir bool // this file has set a WORKDIR (for the check WorkdirRelativePath)
}

// Arg is a declared build argument. A nil Value is one that was declared and has no value.
type Arg struct {
	Name  string
	Value *string
}

// Step is an instruction with everything resolved.
type Step struct {
	Start, End int    // first and last line of the instruction, counted from 1; for a trigger of ONBUILD the FROM line
	Text       string // for progress, as BuildKit shows it after "[stage 2/5] ": `RUN apt-get update`
	History    string // created_by of the history entry; "" makes no entry (ONBUILD)
	Op         Op     // what it does to the root filesystem; nil for nothing (an empty_layer history entry)
	Config     Config // the config once it is done
	Warnings   []Warning

	args      []Argument // declared by this ARG
	inherited []string   // global arguments that this ARG takes over
}

// Op is what a step does to the root filesystem: one of [*Run], [*Copy], [*Mkdir].
type Op interface{ op() }

func (*Run) op()   {}
func (*Copy) op()  {}
func (*Mkdir) op() {}

// Ref names where files come from other than the step's own root. The zero Ref is the build context.
type Ref struct {
	Stage *Stage // a stage of this file
	Name  string // otherwise a named context or an image reference, as written
}

// Run executes a command (RUN).
type Run struct {
	Args     []string // the argument vector; the shell form is already wrapped in SHELL
	Env      []string // "K=V": the image's environment, then build arguments in scope; PATH has a default; HOME is not added here
	Proxy    []string // "K=V": predefined proxy arguments; they reach the process but neither history nor key
	Dir      string   // absolute working directory
	User     string   // as USER says it; "" is root
	Mounts   []Mount
	Files    []Inline // here-document scripts, to be seen at /dev/pipes/NAME with mode 0755
	Network  string   // "default", "none" or "host"; "" is default
	Insecure bool     // --security=insecure
	Hostname string   // BUILDKIT_SANDBOX_HOSTNAME; "" is the default
	Devices  []string // --device values as written
}

// Inline is a small file that stands in the Dockerfile itself (a here-document).
type Inline struct {
	Name string // base name
	Data []byte // after expansion where the rules ask for it
}

// MountType says what a mount shows.
type MountType string

// The types of RUN --mount.
const (
	MountBind   MountType = "bind"
	MountCache  MountType = "cache"
	MountTmpfs  MountType = "tmpfs"
	MountSecret MountType = "secret"
	MountSSH    MountType = "ssh"
)

// Mount is one RUN --mount with all defaults filled in.
type Mount struct {
	Type     MountType
	From     Ref    // bind, cache: where the content comes from; zero is the build context for bind, an empty directory for cache
	HasFrom  bool   // from= was written
	Source   string // bind, cache: path inside From, clean and absolute
	Target   string // absolute; "" for a secret that is only an environment variable
	ReadOnly bool
	ID       string  // cache, secret, ssh; a cache id carries BUILDKIT_CACHE_MOUNT_NS
	Sharing  string  // cache: "shared", "private", "locked"
	Size     int64   // tmpfs: bytes; 0 is no limit
	Mode     *uint32 // cache, secret, ssh: permission bits; nil is the type's default
	UID, GID *int    // cache, secret, ssh; nil is 0
	Required bool    // secret, ssh
	Env      string  // secret: variable to set; "" for none
}

// Copy copies files into the root filesystem (COPY, ADD).
type Copy struct {
	From       Ref      // zero: the build context
	Sources    []Source // in the order written
	Dest       string   // absolute; clean but for a trailing slash, which says "directory"
	Chown      string   // "user[:group]" after expansion, names unresolved; "" keeps the rule's default
	Chmod      string   // octal or symbolic; "" keeps the source's mode
	Link       bool
	Parents    bool
	Exclude    []string // patterns
	Add        bool     // ADD: archives are unpacked, URLs fetched
	Unpack     *bool    // ADD --unpack; nil is the default of the source's kind
	Checksum   string   // ADD --checksum
	KeepGitDir *bool    // ADD --keep-git-dir
}

// Source is one source of a [Copy]: exactly one of Path, Inline and URL is set.
type Source struct {
	Path   string  // path or pattern inside From, clean and absolute
	Pivot  string  // with Copy.Parents: the leading directories of Path that are not kept below Dest; "/" keeps all of them
	Inline *Inline // here-document
	URL    string  // ADD of http(s) or git, as written after expansion
	Git    bool    // URL names a git repository
	Name   string  // the file name that an http(s) URL gives; "__unnamed__" if it gives none
}

// Mkdir makes a directory and its missing parents with mode 0755 (WORKDIR). An existing directory is left as it is.
type Mkdir struct {
	Path string // absolute, clean
	User string // who owns what is made, as USER says it; "" is root
}

// Arg returns the value of a build argument for a whole stage with these steps: the one in scope at its end, or one
// declared above the first FROM, which need not be declared again. It is how the builder itself is told things.
func (s *Stage) Arg(name string, steps []Step) (string, bool) {
	if len(steps) > 0 {
		for _, a := range steps[len(steps)-1].Config.Args {
			if a.Name == name && a.Value != nil {
				return *a.Value, true
			}
		}
	}
	return s.file.global.Get(name)
}
