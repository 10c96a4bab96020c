package attest

import (
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/buildkit/solver/llbsolver/provenance/types"
	"github.com/moby/buildkit/solver/pb"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/dockerfile"
)

// graph describes the steps of a build as BuildKit's operations: each with its inputs, its place in the Dockerfile and
// the layers that it gave.
type graph struct {
	record  Record
	build   Build
	steps   []types.BuildStep
	sources map[string]string            // steps that read something from elsewhere, by its identifier
	last    map[*dockerfile.Stage]string // the last step of a stage; "" for scratch
	places  map[string]*pb.Locations
	layers  map[string][][]ocispec.Descriptor
}

// describe adds to p what only mode=max says.
func (b Build) describe(p *types.ProvenancePredicateSLSA1, r Record, layers []ocispec.Descriptor) {
	g := &graph{
		record: r, build: b, sources: map[string]string{}, last: map[*dockerfile.Stage]string{},
		places: map[string]*pb.Locations{}, layers: map[string][][]ocispec.Descriptor{},
	}
	for _, s := range r.Stages {
		g.stage(s, layers)
	}
	p.BuildDefinition.InternalParameters.BuildConfig = &types.BuildConfig{Definition: g.steps}
	m := &p.RunDetails.Metadata.BuildKitMetadata
	m.Source = &types.Source{
		Locations: g.places,
		Infos:     []types.SourceInfo{{Filename: path.Base(b.Path), Language: "Dockerfile", Data: b.Dockerfile}},
	}
	if len(g.layers) > 0 {
		m.Layers = g.layers
	}
}

func (g *graph) stage(s Stage, layers []ocispec.Descriptor) {
	below := ""
	if base := s.Stage.Base; base.Stage != nil {
		below = g.last[base.Stage]
	} else if base.Name != "scratch" {
		below = g.source(base.Name, s.Platform)
		g.shipped(below, s, layers, s.Below)
	}
	n := s.Below
	for _, st := range s.Steps {
		if st.Op == nil {
			continue
		}
		n++
		below = g.step(s, st, below)
		g.shipped(below, s, layers, n)
	}
	g.last[s.Stage] = below
}

// step adds what an instruction did. What COPY --link copies is made by itself and put on top.
func (g *graph) step(s Stage, st dockerfile.Step, below string) string {
	under, link := below, false
	if op, ok := st.Op.(*dockerfile.Copy); ok && op.Link && below != "" {
		under, link = "", true
	}
	op, in := g.op(s, st.Op, under)
	id := g.add(op, in, s.Platform)
	place := &pb.Locations{Locations: []*pb.Location{{Ranges: []*pb.Range{{
		Start: &pb.Position{Line: int32(st.Start)}, End: &pb.Position{Line: int32(st.End)},
	}}}}}
	g.places[id] = place
	if link {
		id = g.add(&pb.Op{Op: &pb.Op_Merge{Merge: &pb.MergeOp{Inputs: []*pb.MergeInput{{Input: 0}, {Input: 1}}}}}, inputs{below, id}, s.Platform)
		g.places[id] = place
	}
	return id
}

// shipped notes the layers of the result up to a step.
func (g *graph) shipped(id string, s Stage, layers []ocispec.Descriptor, n int) {
	if s.Result && n > 0 && n <= len(layers) {
		g.layers[id+":0"] = [][]ocispec.Descriptor{layers[:n]}
	}
}

// add appends a step and returns its name.
func (g *graph) add(op *pb.Op, inputs []string, p ocispec.Platform) string {
	id := "step" + strconv.Itoa(len(g.steps))
	op.Platform = &pb.Platform{Architecture: p.Architecture, OS: p.OS, Variant: p.Variant}
	st := types.BuildStep{ID: id, Op: op}
	for _, in := range inputs {
		st.Inputs = append(st.Inputs, in+":0")
	}
	g.steps = append(g.steps, st)
	return id
}

// source returns the step that reads an image or a context.
func (g *graph) source(name string, p ocispec.Platform) string {
	id, attrs := "local://"+name, map[string]string(nil)
	if name == "" {
		id = "local://context"
	}
	if c := g.build.Contexts[name]; c.Fetched.URL != "" {
		id, attrs = identifier(c.Fetched)
	}
	i := slices.IndexFunc(g.record.Images, func(img Image) bool { return img.Name == name && same(img.Platform, p) })
	if i < 0 {
		i = slices.IndexFunc(g.record.Images, func(img Image) bool { return img.Name == name })
	}
	if i >= 0 {
		id = g.record.Images[i].identifier()
	}
	return g.from(id, attrs, p)
}

func same(a, b ocispec.Platform) bool {
	return a.OS == b.OS && a.Architecture == b.Architecture && a.Variant == b.Variant
}

// from returns the step that reads what an identifier names for a platform.
func (g *graph) from(id string, attrs map[string]string, p ocispec.Platform) string {
	key := id + " " + p.OS + "/" + p.Architecture + "/" + p.Variant
	if known, ok := g.sources[key]; ok {
		return known
	}
	g.sources[key] = g.add(&pb.Op{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: id, Attrs: attrs}}}, nil, p)
	return g.sources[key]
}

func (img Image) identifier() string {
	id := img.Ref
	if dir, ok := strings.CutPrefix(id, "oci-layout://"); ok {
		id = "oci-layout://" + layoutName(dir)
	} else if file, ok := strings.CutPrefix(id, "target:"); ok {
		id = "target:" + path.Base(file)
	} else if !strings.Contains(id, "://") {
		id = "docker-image://" + id
	}
	if img.Digest != "" && !strings.Contains(id, "@") {
		id += "@" + img.Digest.String()
	}
	return id
}

func identifier(f Fetched) (string, map[string]string) {
	u := redacted(f.URL)
	if f.Commit == "" {
		return u, map[string]string{"http.checksum": f.Digest.String()}
	}
	_, rest, _ := strings.Cut(u, "://")
	return "git://" + rest, map[string]string{"git.fullurl": u, "git.checksum": f.Commit}
}

// inputs collects the inputs of a step.
type inputs []string

// add returns the number of an input; -1 for scratch.
func (in *inputs) add(id string) int64 {
	if id == "" {
		return -1
	}
	if i := slices.Index(*in, id); i >= 0 {
		return int64(i)
	}
	*in = append(*in, id)
	return int64(len(*in) - 1)
}

func (g *graph) op(s Stage, op dockerfile.Op, below string) (*pb.Op, inputs) {
	switch op := op.(type) {
	case *dockerfile.Run:
		return g.run(s, op, below)
	case *dockerfile.Copy:
		return g.copy(s, op, below)
	case *dockerfile.Mkdir:
		var in inputs
		action := &pb.FileAction{Input: in.add(below), SecondaryInput: -1, Action: &pb.FileAction_Mkdir{Mkdir: &pb.FileActionMkDir{
			Path: op.Path, Mode: 0o755, MakeParents: true, Owner: owner(op.User, ""), Timestamp: -1,
		}}}
		return files(action), in
	}
	panic(fmt.Sprintf("unknown op %T", op))
}

func files(actions ...*pb.FileAction) *pb.Op {
	return &pb.Op{Op: &pb.Op_File{File: &pb.FileOp{Actions: actions}}}
}

// owner is an owner by name or number; nil for none.
func owner(user, group string) *pb.ChownOpt {
	if user == "" && group == "" {
		return nil
	}
	one := func(s string) *pb.UserOpt {
		if s == "" {
			return nil
		}
		if n, err := strconv.ParseUint(s, 10, 32); err == nil {
			return &pb.UserOpt{User: &pb.UserOpt_ByID{ByID: uint32(n)}}
		}
		return &pb.UserOpt{User: &pb.UserOpt_ByName{ByName: &pb.NamedUserOpt{Name: s}}}
	}
	return &pb.ChownOpt{User: one(user), Group: one(group)}
}

func (g *graph) copy(s Stage, op *dockerfile.Copy, below string) (*pb.Op, inputs) {
	var in inputs
	under := in.add(below)
	user, group, _ := strings.Cut(op.Chown, ":")
	var actions []*pb.FileAction
	for _, src := range op.Sources {
		a := &pb.FileAction{Input: under, SecondaryInput: -1, Output: -1}
		if src.Inline != nil {
			to := op.Dest
			if strings.HasSuffix(to, "/") || len(op.Sources) > 1 {
				to = path.Join(to, src.Inline.Name)
			}
			a.Action = &pb.FileAction_Mkfile{Mkfile: &pb.FileActionMkFile{
				Path: to, Mode: 0o644, Data: src.Inline.Data, Owner: owner(user, group), Timestamp: -1,
			}}
			actions = append(actions, a)
			continue
		}
		c := &pb.FileActionCopy{
			Src: src.Path, Dest: op.Dest, Owner: owner(user, group), Mode: -1, FollowSymlink: true, DirCopyContents: true,
			AttemptUnpackDockerCompatibility: op.Add && (op.Unpack == nil && src.URL == "" || op.Unpack != nil && *op.Unpack),
			CreateDestPath:                   true, AllowWildcard: src.URL == "", AllowEmptyWildcard: src.URL == "",
			ExcludePatterns: op.Exclude, ModeStr: op.Chmod, Timestamp: -1,
		}
		if src.URL != "" {
			c.Src = path.Join("/", src.Name)
		}
		a.SecondaryInput = in.add(g.copied(s, op, src))
		a.Action = &pb.FileAction_Copy{Copy: c}
		actions = append(actions, a)
	}
	actions[len(actions)-1].Output = 0
	return files(actions...), in
}

// copied returns the step that a source is taken from.
func (g *graph) copied(s Stage, op *dockerfile.Copy, src dockerfile.Source) string {
	if src.URL == "" {
		return g.ref(s, op.From)
	}
	f := Fetched{URL: src.URL}
	if i := slices.IndexFunc(g.record.Fetched, func(o Fetched) bool { return o.URL == src.URL }); i >= 0 {
		f = g.record.Fetched[i]
	}
	id, attrs := identifier(f)
	return g.from(id, attrs, s.Platform)
}

// ref returns the step that files are taken from; "" for scratch.
func (g *graph) ref(s Stage, from dockerfile.Ref) string {
	if from.Stage != nil {
		return g.last[from.Stage]
	}
	if from.Name == "scratch" {
		return ""
	}
	return g.source(from.Name, s.Platform)
}

func (g *graph) run(s Stage, op *dockerfile.Run, below string) (*pb.Op, inputs) {
	var in inputs
	exec := &pb.ExecOp{
		Meta:   &pb.Meta{Args: op.Args, Env: environment(op.Env), Cwd: op.Dir, User: op.User, Hostname: op.Hostname},
		Mounts: []*pb.Mount{{Input: in.add(below), Dest: "/"}},
	}
	switch op.Network {
	case "none":
		exec.Network = pb.NetMode_NONE
	case "host":
		exec.Network = pb.NetMode_HOST
	}
	if op.Insecure {
		exec.Security = pb.SecurityMode_INSECURE
	}
	for _, f := range op.Files {
		a := &pb.FileAction{Input: -1, SecondaryInput: -1, Action: &pb.FileAction_Mkfile{Mkfile: &pb.FileActionMkFile{Path: "/" + f.Name, Mode: 0o755, Data: f.Data, Timestamp: -1}}}
		exec.Mounts = append(exec.Mounts, &pb.Mount{
			Input: in.add(g.add(files(a), nil, s.Platform)), Selector: f.Name, Dest: path.Join("/dev/pipes", f.Name), Output: -1, Readonly: true,
		})
	}
	for _, m := range op.Mounts {
		if m.Type == dockerfile.MountSecret && m.Env != "" {
			exec.Secretenv = append(exec.Secretenv, &pb.SecretEnv{ID: m.ID, Name: m.Env, Optional: !m.Required})
		}
		if m.Target != "" {
			exec.Mounts = append(exec.Mounts, g.mount(s, m, &in))
		}
	}
	return &pb.Op{Op: &pb.Op_Exec{Exec: exec}}, in
}

// environment is env without users and passwords of URLs.
func environment(env []string) []string {
	var out []string
	for _, kv := range env {
		k, v, _ := strings.Cut(kv, "=")
		out = append(out, k+"="+redacted(v))
	}
	return out
}

func (g *graph) mount(s Stage, m dockerfile.Mount, in *inputs) *pb.Mount {
	p := &pb.Mount{Input: -1, Dest: m.Target, Output: -1, Readonly: m.ReadOnly}
	switch m.Type {
	case dockerfile.MountBind:
		p.Input, p.Selector = in.add(g.ref(s, m.From)), m.Source
	case dockerfile.MountCache:
		p.MountType, p.CacheOpt = pb.MountType_CACHE, &pb.CacheOpt{ID: m.ID, Sharing: sharing[m.Sharing]}
		if m.HasFrom {
			p.Input, p.Selector = in.add(g.ref(s, m.From)), m.Source
		}
	case dockerfile.MountTmpfs:
		p.MountType, p.TmpfsOpt = pb.MountType_TMPFS, &pb.TmpfsOpt{Size: m.Size}
	case dockerfile.MountSecret:
		p.MountType, p.SecretOpt = pb.MountType_SECRET, &pb.SecretOpt{ID: m.ID, Optional: !m.Required}
	case dockerfile.MountSSH:
		p.MountType, p.SSHOpt = pb.MountType_SSH, &pb.SSHOpt{ID: m.ID, Optional: !m.Required}
	}
	return p
}

var sharing = map[string]pb.CacheSharingOpt{"shared": pb.CacheSharingOpt_SHARED, "private": pb.CacheSharingOpt_PRIVATE, "locked": pb.CacheSharingOpt_LOCKED}
