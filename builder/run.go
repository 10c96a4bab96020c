package builder

import (
	"cmp"
	"context"
	"fmt"
	"path"
	"slices"
	"strings"

	"filo/builder/sandbox"
	"filo/dockerfile"
	"filo/layer"
)

// runKey is what of a RUN goes into its key, apart from the layers below and the content of its mounts. Values of
// secrets and proxies, addresses of --add-host and identities of cache mounts are left out on purpose.
type runKey struct {
	Run      string // names the op among others
	Args     []string
	Env      []string
	Dir      string
	User     string              `json:",omitempty"`
	Files    []dockerfile.Inline `json:",omitempty"`
	Mounts   []mountKey          `json:",omitempty"`
	Network  string              `json:",omitempty"`
	Insecure bool                `json:",omitempty"`
	Hostname string              `json:",omitempty"`
	Hosts    []string            `json:",omitempty"`
	ShmSize  int64               `json:",omitempty"`
	Ulimits  []sandbox.Ulimit    `json:",omitempty"`
	Epoch    *int64              `json:",omitempty"`
	Platform string
}

// runStep is a RUN ready to be keyed and done.
type runStep struct {
	op     *dockerfile.Run
	mounts []mount
	more   bool // another RUN follows in the stage
	sinks  layer.Sinks
	based  int // how many of the layers below are those of an image
}

func (b *build) runKey(r runStep, platform string) runKey {
	op := r.op
	k := runKey{
		Run: "run", Args: op.Args, Env: op.Env, Dir: op.Dir, User: op.User, Files: op.Files,
		Network: b.network(op), Insecure: op.Insecure, Hostname: op.Hostname,
		ShmSize: b.req.ShmSize, Ulimits: b.req.Ulimits, Epoch: b.clamp(), Platform: platform,
	}
	for _, m := range r.mounts {
		k.Mounts = append(k.Mounts, m.key)
	}
	for _, h := range b.req.Hosts {
		name, _, _ := strings.Cut(h, ":")
		k.Hosts = append(k.Hosts, name)
	}
	return k
}

func (b *build) network(op *dockerfile.Run) string {
	n := op.Network
	if n == "" || n == string(sandbox.NetworkDefault) {
		n = b.req.Network
	}
	if n == string(sandbox.NetworkDefault) {
		n = ""
	}
	return n
}

// run does a RUN on the layers below and returns the layer of what it changed.
func (w *walk) run(ctx context.Context, v *vertex, r runStep, below []layer.Layer) (layer.Layer, error) {
	w.runner.Expect(w.req.Ground, w.req.Limits, r.op.Insecure)
	unpacked := v.phase(Unpacking)
	view, trees, err := w.Store.Prepare(ctx, below, r.based)
	unpacked()
	if err != nil {
		return layer.Layer{}, err
	}
	w.trial.await(trees)
	acc, err := readAccounts(view)
	if err != nil {
		return layer.Layer{}, err
	}
	who, err := acc.lookup(r.op.User)
	if err != nil {
		return layer.Layer{}, err
	}
	p := w.process(v, r.op, who)
	release, err := w.mount(ctx, &p, r, view)
	defer release()
	if err != nil {
		return layer.Layer{}, err
	}
	return w.execute(ctx, v, p, r, below)
}

// execute runs p, which is the process of r, on a fresh overlay over below and makes a layer of it.
func (w *walk) execute(ctx context.Context, v *vertex, p sandbox.Process, r runStep, below []layer.Layer) (layer.Layer, error) {
	var points []layer.MountPoint
	for _, m := range sandbox.MountPoints(p) {
		points = append(points, layer.MountPoint{Path: m.Path, Dir: m.Dir})
	}
	unpacked := v.phase(Unpacking)
	o, err := w.Store.Overlay(ctx, below, points)
	unpacked()
	if err != nil {
		return layer.Layer{}, err
	}
	defer o.Close()
	w.trial.await(o.Trees)
	if err := w.turn(ctx, v); err != nil {
		return layer.Layer{}, err
	}
	defer w.jobs.Release(1)
	p.Root = rootOf(o)
	ran := v.phase(Running)
	gone, err := w.runIn(ctx, p, r.more)
	defer gone()
	ran()
	if err != nil {
		return layer.Layer{}, cmp.Or(w.trial.verdict(), err) // a damaged program fails
	}
	defer v.phase(Snapshoting)()
	o.Gone = gone
	return w.Store.Snapshot(ctx, o, r.sinks)
}

// runIn runs p for no longer than the request allows. The caller calls gone; see [sandbox.Runner.Execute].
func (w *walk) runIn(ctx context.Context, p sandbox.Process, more bool) (gone func(), err error) {
	cancel := func() {}
	if d := w.req.Longest; d > 0 {
		ctx, cancel = context.WithTimeoutCause(ctx, d, fmt.Errorf("process %q was stopped: it took longer than %s (--step-timeout)", strings.Join(p.Args, " "), d))
	}
	left, err := w.runner.Execute(ctx, p, more)
	return func() {
		left()
		cancel()
	}, err
}

func rootOf(o *layer.Overlay) sandbox.Root {
	return sandbox.Root{Dir: o.Root, Lower: o.Lower, Upper: o.Upper, Work: o.Work}
}

// process is op as a sandbox process, without its root and mounts.
func (w *walk) process(v *vertex, op *dockerfile.Run, who account) sandbox.Process {
	p := sandbox.Process{
		Ground: w.req.Ground,
		Args:   op.Args, Env: slices.Concat(op.Env, op.Proxy), Dir: op.Dir,
		UID: who.uid, GID: who.gid, Groups: who.groups,
		Hostname: op.Hostname, Network: sandbox.Network(w.network(op)),
		ExtraHosts: w.req.Hosts, DNS: w.req.DNS, ShmSize: w.req.ShmSize, Ulimits: w.req.Ulimits, Limits: w.req.Limits, Insecure: op.Insecure,
		Stdout: output{v, 1}, Stderr: output{v, 2},
	}
	p.Env = withHome(p.Env, who.home)
	for _, f := range op.Files {
		p.Mounts = append(p.Mounts, sandbox.Mount{
			Type: sandbox.Data, Data: f.Data, Mode: 0o755, Target: path.Join("/dev/pipes", f.Name), ReadOnly: true,
		})
	}
	return p
}

// withHome sets HOME unless it is there and not empty.
func withHome(env []string, home string) []string {
	i := slices.IndexFunc(env, func(kv string) bool { return strings.HasPrefix(kv, "HOME=") })
	if i < 0 {
		return append(env, "HOME="+home)
	}
	if env[i] == "HOME=" {
		env[i] += home
	}
	return env
}

// allowed checks what a RUN needs that must be granted with --allow.
func (b *build) allowed(op *dockerfile.Run) error {
	grant := ""
	switch {
	case op.Insecure:
		grant = "security.insecure"
	case b.network(op) == string(sandbox.NetworkHost):
		grant = "network.host"
	case len(op.Devices) > 0:
		return fmt.Errorf("RUN --device=%s: a feature of the labs syntax that filo does not have", op.Devices[0])
	}
	if grant == "" || slices.Contains(b.req.Allow, grant) {
		return nil
	}
	return fmt.Errorf("granting entitlement %s is not allowed by build configuration: call with --allow %s", grant, grant)
}
