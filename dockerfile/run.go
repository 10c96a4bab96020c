package dockerfile

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
)

func (st *state) run(c *instructions.RunCommand, froms []Ref, step *Step) error {
	op := &Run{
		Dir:      st.config.WorkingDir,
		User:     st.config.User,
		Proxy:    proxyEnv(st.file.args.Build),
		Network:  instructions.GetNetwork(c),
		Insecure: instructions.GetSecurity(c) == instructions.SecurityInsecure,
		Hostname: st.file.args.Build[hostnameArg],
	}
	if op.Dir == "" {
		op.Dir = "/"
	}
	for _, d := range instructions.GetDevices(c) {
		name := d.Name
		if d.Required {
			name += ",required"
		}
		op.Devices = append(op.Devices, name)
	}
	words, note, err := script(c, op)
	if err != nil {
		return err
	}
	if c.PrependShell {
		words = st.inShell(words)
	}
	op.Args = words
	if err := st.mounts(c, froms, op); err != nil {
		return err
	}
	op.Env = st.runEnv(op.Mounts)
	for _, kv := range op.Env {
		if err := st.grow(len(kv)); err != nil {
			return err
		}
	}
	step.Op = op
	step.Text = st.runTitle(c, note)
	step.History = "RUN " + st.runHistory(words) + " # buildkit"
	return nil
}

// script returns the words of the command with its here-documents worked in, and a note on them for the title.
func script(c *instructions.RunCommand, op *Run) (words []string, note string, err error) {
	if len(c.Files) == 0 {
		return c.CmdLine, "", nil
	}
	if len(c.CmdLine) != 1 || !c.PrependShell {
		return nil, "", fmt.Errorf("a here-document needs the shell form: %v", c.CmdLine)
	}
	line := c.CmdLine[0]
	alone, err := parser.ParseHeredoc(line)
	if err != nil {
		return nil, "", err
	}
	if alone == nil { // the shell reads them
		for _, f := range c.Files {
			line += "\n" + f.Data + f.Name
		}
		return []string{line}, "", nil
	}
	doc := c.Files[0]
	data := doc.Data
	if doc.Chomp {
		data = parser.ChompHeredocContent(data)
	}
	note = fmt.Sprintf(" (%s)", summary(doc.Data))
	if !strings.HasPrefix(data, "#!") {
		return []string{data}, note, nil
	}
	if doc.Name == "." || doc.Name == ".." || strings.Contains(doc.Name, "/") {
		return nil, "", fmt.Errorf("the name %q of a here-document with #! cannot be a file name", doc.Name)
	}
	op.Files = []Inline{{Name: doc.Name, Data: []byte(data)}}
	return []string{"/dev/pipes/" + doc.Name}, note, nil
}

// summary returns the first line of a text, with dots if there is more.
func summary(text string) string {
	first, rest, _ := strings.Cut(strings.ReplaceAll(strings.TrimSpace(text), "\r\n", "\n"), "\n")
	if rest != "" {
		return first + "..."
	}
	return first
}

// runEnv returns the environment of a command. With an ssh mount that tells of the socket, unless the image or an argument
// says what it is; as in BuildKit also where no agent is given.
func (st *state) runEnv(mounts []Mount) []string {
	e := st.vars.clone()
	for _, m := range mounts {
		if m.Type != MountSSH {
			continue
		}
		if _, ok := e.Get("SSH_AUTH_SOCK"); !ok {
			e.set("SSH_AUTH_SOCK", m.Target)
		}
		break
	}
	if _, ok := e.Get("PATH"); !ok {
		e.set("PATH", defaultPath)
	}
	return e.list()
}

// masked shows variables that come from secrets as stars.
type masked struct {
	*env
	secrets []string
}

func (m masked) Get(k string) (string, bool) {
	if slices.Contains(m.secrets, k) {
		return "****", true
	}
	return m.env.Get(k)
}

func (st *state) runTitle(c *instructions.RunCommand, note string) string {
	vars := masked{env: st.vars}
	for _, m := range instructions.GetMounts(c) {
		if m.Type == instructions.MountTypeSecret && m.Env != nil {
			vars.secrets = append(vars.secrets, *m.Env)
		}
	}
	text := c.String() + note
	if plain(text) {
		return upperFirst(text)
	}
	lex := st.file.lex()
	lex.RawQuotes, lex.RawEscapes, lex.SkipUnsetEnv = true, true, true
	return st.title(lex, text, vars)
}

// runHistory returns the command, with the arguments in scope before it and how many they are.
func (st *state) runHistory(words []string) string {
	var b strings.Builder
	if n := len(st.config.Args); n > 0 {
		fmt.Fprintf(&b, "|%d ", n)
	}
	for _, a := range st.config.Args {
		v, ok := st.vars.Get(a.Name)
		if !ok && a.Value != nil {
			v = *a.Value
		}
		b.WriteString(a.Name + "=" + v + " ")
	}
	b.WriteString(strings.Join(words, " "))
	return b.String()
}

func (st *state) mounts(c *instructions.RunCommand, froms []Ref, op *Run) error {
	agents := 0
	for i, m := range instructions.GetMounts(c) {
		mount := Mount{Type: MountType(m.Type), ReadOnly: m.ReadOnly, Required: m.Required}
		var err error
		switch m.Type {
		case instructions.MountTypeSecret:
			err = st.secret(m, &mount)
		case instructions.MountTypeSSH:
			err = st.ssh(m, agents, &mount)
			agents++
		default:
			err = st.files(m, froms[i], &mount)
		}
		if err != nil {
			return err
		}
		op.Mounts = append(op.Mounts, mount)
	}
	return nil
}

// files fills in a mount of files: bind, cache, tmpfs.
func (st *state) files(m *instructions.Mount, from Ref, out *Mount) error {
	out.Target = st.target(m.Target)
	if out.Target == "/" {
		return fmt.Errorf("invalid mount target %q", m.Target)
	}
	if m.Type == instructions.MountTypeTmpfs {
		if path.Join("/", m.Source) != "/" {
			return errors.New("a tmpfs mount starts empty, it has no source")
		}
		out.Size = m.SizeLimit
		return nil
	}
	out.From, out.HasFrom = from, m.From != ""
	out.Source = path.Join("/", m.Source)
	if m.Type != instructions.MountTypeCache {
		return nil
	}
	out.ID, out.Sharing = m.CacheID, string(m.CacheSharing)
	if out.ID == "" {
		out.ID = path.Clean(m.Target)
	}
	if ns := st.file.args.Build[cacheNSArg]; ns != "" {
		out.ID = ns + "/" + out.ID
	}
	if out.Sharing == "" {
		out.Sharing = string(instructions.MountSharingShared)
	}
	if out.Source == "/" { // a directory of the source keeps the owner and mode it has there
		setOwner(m, out)
	}
	return nil
}

func (st *state) secret(m *instructions.Mount, out *Mount) error {
	out.ID = m.CacheID
	if m.Source != "" {
		out.ID = m.Source
	}
	if out.ID == "" {
		if m.Target == "" {
			return errors.New("one of source, target required")
		}
		out.ID = path.Base(m.Target)
	}
	if m.Env != nil {
		out.Env = *m.Env
		if out.Env == "" {
			out.Env = out.ID
		}
	}
	switch {
	case m.Target != "":
		out.Target = st.target(m.Target)
	case m.Env == nil:
		out.Target = "/run/secrets/" + path.Base(out.ID)
	}
	if out.Target == "/" {
		return fmt.Errorf("invalid mount target %q", m.Target)
	}
	setOwner(m, out)
	return nil
}

func (st *state) ssh(m *instructions.Mount, n int, out *Mount) error {
	if m.Source != "" {
		return errors.New("ssh does not support source")
	}
	out.ID, out.Target = m.CacheID, fmt.Sprintf("/run/buildkit/ssh_agent.%d", n)
	if out.ID == "" {
		out.ID = "default"
	}
	if m.Target != "" {
		out.Target = st.target(m.Target)
	}
	if out.Target == "/" {
		return fmt.Errorf("invalid mount target %q", m.Target)
	}
	setOwner(m, out)
	return nil
}

func (st *state) target(p string) string {
	if path.IsAbs(p) {
		return path.Clean(p)
	}
	return path.Join("/", st.config.WorkingDir, p)
}

func setOwner(m *instructions.Mount, out *Mount) {
	if m.UID != nil {
		uid := int(*m.UID)
		out.UID = &uid
	}
	if m.GID != nil {
		gid := int(*m.GID)
		out.GID = &gid
	}
	if m.Mode != nil {
		mode := uint32(*m.Mode)
		out.Mode = &mode
	}
}
