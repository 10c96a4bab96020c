package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"filo/builder/sandbox"
	"filo/builder/sandbox/seccomp"
	"filo/cache"
	"filo/cmd/filo/progress"
	"filo/layer"
	"filo/layer/registry"
)

// world is what the commands see of the machine.
type world struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	env            func(name string) (string, bool)
	root           bool // the user is root
	now            func() time.Time
}

// getenv returns the value of an environment variable, "" if it is not set.
func (w world) getenv(name string) string {
	v, _ := w.env(name)
	return v
}

// app is one run of filo.
type app struct {
	world
	stateDir  string            // --root
	hosts     string            // --registry-config
	isolation string            // --isolation
	storage   string            // --storage
	display   *progress.Display // of a build; its last lines are shown with an error
	repairs   *repairs
	pulls     *pulls
	misused   error // help was asked for about what is no command
}

const longHelp = `filo builds OCI images from Dockerfiles. It is one program: no daemon, no root needed.

  filo build -t hello .                              build ./Dockerfile, keep the image as "hello"
  filo build -o type=oci,dest=image.tar .            write an OCI archive
  filo build -t registry.example/me/app:1 --push .   build and push

What it keeps (images, layers, cache) is in one directory, --root: $FILO_ROOT if set, /var/lib/filo for root,
else $XDG_DATA_HOME/filo or ~/.local/share/filo. Credentials come from Docker's configuration.`

const environmentHelp = `
Environment:
  FILO_ROOT               state directory
  FILO_KEEP_STORAGE       default of build --keep-storage
  FILO_REGISTRY_MIRRORS   mirrors by registry: docker.io=HOST:PORT[/PATH],…
  FILO_REGISTRY_CONFIG    default of --registry-config
  DOCKER_CONFIG           directory of Docker's config.json with credentials
  SOURCE_DATE_EPOCH       passed to builds as a build argument: pins all times of the image
  BUILDKIT_PROGRESS       default of build --progress
  GITHUB_ACTIONS          true lets build --progress ci mark groups
  GITLAB_CI               true lets build --progress ci mark sections
  BUILDKIT_TTY_LOG_LINES  lines of the output of a running step on a terminal (default 6)
  NO_COLOR                no colours on a terminal
  SSH_AUTH_SOCK           agent of build --ssh default
  BUILDX_GIT_LABELS       1 labels images with source and revision of the git checkout they are built from
  BUILDX_GIT_CHECK_DIRTY  1 marks the revision of a checkout that was changed as dirty
`

// command returns the command line of filo, ready to execute args.
func (a *app) command(args []string) *cobra.Command {
	cmd := &cobra.Command{
		Use:           "filo",
		Short:         "Build OCI images from Dockerfiles",
		Long:          longHelp,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          exactly(0),
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.SetArgs(args)
	cmd.SetIn(a.stdin)
	cmd.SetOut(a.stdout)
	cmd.SetErr(a.stderr)
	cmd.SetUsageTemplate(cmd.UsageTemplate() + environmentHelp)
	cmd.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		if !c.HasParent() && c.Flags().NArg() > 0 {
			err = unknown(c.Flags().Arg(0)) // whose flags are unknown too
		}
		return &usageError{c.CommandPath(), err}
	})
	help := cmd.HelpFunc()
	cmd.SetHelpFunc(func(c *cobra.Command, words []string) {
		if !c.HasParent() && c.Flags().NArg() > 0 { // filo nope --help: cobra takes any help for a success
			a.misused = &usageError{c.CommandPath(), unknown(c.Flags().Arg(0))}
			return
		}
		help(c, words)
	})
	cmd.SetHelpCommand(helpCommand(cmd))
	cmd.PersistentFlags().StringVar(&a.stateDir, "root", "", "state `directory` (default $FILO_ROOT, or a per-user directory)")
	cmd.PersistentFlags().StringVar(&a.hosts, "registry-config", "", "mirrors, http and authorities of registries: a registries.conf, a hosts.toml, or a `directory` of HOST/hosts.toml (default $FILO_REGISTRY_CONFIG)")
	cmd.PersistentFlags().StringVar(&a.isolation, "isolation", "auto", "how steps are isolated: auto, root, rootless or chroot")
	cmd.PersistentFlags().StringVar(&a.storage, "storage", "auto", "how layers become one directory for RUN: auto, overlay, btrfs or vfs")
	cmd.AddCommand(a.build(), a.push(), a.pull(), a.images(), a.inspect(), a.history(), a.tag(), a.rmi(), a.prune(), a.du(), a.info(), a.versionCommand())
	return cmd
}

// helpCommand is `filo help`. It differs from cobra's own in that it fails for what is no command.
func helpCommand(root *cobra.Command) *cobra.Command {
	return &cobra.Command{
		Use:   "help [command]",
		Short: "Help about any command",
		RunE: func(c *cobra.Command, args []string) error {
			of, rest, err := root.Find(args)
			if err == nil && len(rest) > 0 {
				err = unknown(strings.Join(args, " "))
			}
			if err != nil {
				return &usageError{root.CommandPath(), err}
			}
			of.InitDefaultHelpFlag()
			return of.Help()
		},
	}
}

// usageError is a command line that filo does not understand.
type usageError struct {
	command string // "filo build"
	err     error
}

func (e *usageError) Error() string {
	return fmt.Sprintf("%s: %v\nSee '%s --help'.", e.command, e.err, e.command)
}

func (e *usageError) Unwrap() error { return e.err }

// unknown is the error of a word that is no command.
func unknown(word string) error {
	hint := ""
	if word == "bake" {
		hint = ": run `filo build` for each target; `docker buildx bake --print` shows what to say with its flags"
	}
	return fmt.Errorf("unknown command %q%s", word, hint)
}

// exactly accepts n arguments.
func exactly(n int) cobra.PositionalArgs { return between(n, n) }

// between accepts least to most arguments; most below 0 is no limit.
func between(least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if !cmd.HasParent() && len(args) > 0 {
			return &usageError{cmd.CommandPath(), unknown(args[0])}
		}
		if len(args) >= least && (most < 0 || len(args) <= most) {
			return nil
		}
		word := "requires"
		if least != most {
			word = "requires at least"
		}
		plural := "s"
		if least == 1 {
			plural = ""
		}
		return &usageError{cmd.CommandPath(), fmt.Errorf("%s %d argument%s, got %d", word, least, plural, len(args))}
	}
}

// rootless is the ground of a user who is not root.
const rootless = "rootless"

// state is the state directory opened, with those who work on it.
type state struct {
	ground   sandbox.Ground
	storing  func() storing // of a state that was entered
	store    *layer.Store
	cache    *cache.Store
	registry *registry.Client
}

// open opens the state directory. With enter it first enters the ground on which steps run, which may start filo again
// in a user namespace: so it must be called before standard input is read.
func (a *app) open(enter bool) (*state, error) {
	s := &state{}
	var err error
	if !slices.Contains([]string{"auto", "root", "rootless", "chroot"}, a.isolation) {
		return nil, &usageError{"filo", fmt.Errorf("--isolation %q: must be auto, root, rootless or chroot", a.isolation)}
	}
	enter = enter || sandbox.Entered()
	if enter {
		if s.ground, err = sandbox.Enter(a.isolation); err != nil {
			return nil, err
		}
		if !seccomp.Known(runtime.GOARCH) {
			s.ground.Reason += "; no seccomp filter on " + runtime.GOARCH
		}
	}
	dir, err := a.dir(s.ground)
	if err != nil {
		return nil, err
	}
	if s.registry, err = a.client(); err != nil {
		return nil, err
	}
	if s.store, err = layer.Open(dir, layer.Options{SingleID: s.ground.SingleID, Pulling: a.pulls.begin, Repaired: a.repairs.add}); err != nil {
		return nil, err
	}
	if enter {
		s.storing, err = a.useStorage(s.ground, s.store)
	}
	if err == nil {
		err = s.prepare(dir, a.now, a.repairs.add)
	}
	if err != nil {
		s.store.Close()
		return nil, err
	}
	return s, nil
}

// prepare opens what needs the store.
func (s *state) prepare(dir string, now func() time.Time, repaired func(string)) error {
	var err error
	if s.cache, err = cache.Open(dir, s.store.TempDir(), now); err != nil {
		return err
	}
	s.cache.Repaired = repaired
	return nil
}

// with opens the state directory for do, which looks at images and runs nothing.
func (a *app) with(do func(*state) error) error { return a.opened(false, do) }

// within is with, on the ground where steps run: there do may read all files of layers.
func (a *app) within(do func(*state) error) error { return a.opened(true, do) }

func (a *app) opened(enter bool, do func(*state) error) error {
	s, err := a.open(enter)
	if err != nil {
		return err
	}
	defer s.store.Close()
	return do(s)
}

// dir returns the state directory, absolute. On the rootless ground filo looks like root to itself and is not.
func (a *app) dir(g sandbox.Ground) (string, error) {
	if a.stateDir != "" {
		return filepath.Abs(a.stateDir)
	}
	if d := a.getenv("FILO_ROOT"); d != "" {
		return filepath.Abs(d)
	}
	if a.root && g.Name != rootless {
		return "/var/lib/filo", nil
	}
	if d := a.getenv("XDG_DATA_HOME"); filepath.IsAbs(d) { // a relative value is to be ignored (XDG base directory spec)
		return filepath.Join(d, "filo"), nil
	}
	if d := a.getenv("HOME"); d != "" {
		return filepath.Join(d, ".local/share/filo"), nil
	}
	return "", fmt.Errorf("find state directory: HOME is not set; use --root or FILO_ROOT")
}

// client returns the registry client that the environment asks for.
func (a *app) client() (*registry.Client, error) {
	mirrors, err := registry.ParseMirrors(a.getenv("FILO_REGISTRY_MIRRORS"))
	if err != nil {
		return nil, fmt.Errorf("FILO_REGISTRY_MIRRORS: %w", err)
	}
	var config registry.Config
	if path := cmp.Or(a.hosts, a.getenv("FILO_REGISTRY_CONFIG")); path != "" {
		if config, err = registry.ReadConfig(path); err != nil {
			return nil, fmt.Errorf("read registry configuration: %w", err)
		}
	}
	return registry.Open(registry.Options{Mirrors: mirrors, Config: config, UserAgent: "filo/" + version()}), nil
}

// newDisplay starts the display of what a command does; timed is for plain progress.
func (a *app) newDisplay(mode progress.Mode, timed bool) (*progress.Display, error) {
	_, noColor := a.env("NO_COLOR")
	lines, _ := strconv.Atoi(a.getenv("BUILDKIT_TTY_LOG_LINES")) // of what is no number the default is used
	d, err := progress.New(a.stderr, progress.Options{
		Mode: mode, Now: a.now, Size: terminalSize(a.stderr), Color: !noColor, LogLines: lines, Timed: timed, Fold: a.fold(), Ticker: ticker,
	})
	if err != nil {
		return nil, err
	}
	a.display = d
	return d, nil
}

// fold is what folds lines here.
func (w world) fold() progress.Fold {
	switch "true" {
	case w.getenv("GITHUB_ACTIONS"):
		return progress.GitHub
	case w.getenv("GITLAB_CI"):
		return progress.GitLab
	}
	return progress.NoFold
}

// canceled replaces the error of a command that a signal ended by the signal.
func canceled(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// writeFile writes data to a file, whole or not at all. What is there and no file, such as /dev/null or a link, stays and is
// written to.
func writeFile(path string, data []byte) error {
	if fi, err := os.Lstat(path); err == nil && !fi.Mode().IsRegular() {
		return os.WriteFile(path, data, 0o644)
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
