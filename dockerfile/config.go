package dockerfile

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/linter"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
)

// configure does the instructions that only change the config and returns what they leave in the history.
func (st *state) configure(cmd instructions.Command) (string, error) {
	switch c := cmd.(type) {
	case *instructions.EnvCommand:
		return st.env(c), nil
	case *instructions.LabelCommand:
		return st.label(c), nil
	case *instructions.MaintainerCommand:
		st.config.Author = c.Maintainer
		return "MAINTAINER " + c.Maintainer, nil
	case *instructions.CmdCommand:
		return st.cmd(c), nil
	case *instructions.EntrypointCommand:
		return st.entrypoint(c), nil
	case *instructions.HealthCheckCommand:
		st.once(c.Name(), c.Location())
		health := *c.Health
		st.config.Healthcheck = &health
		return fmt.Sprintf("HEALTHCHECK %+v", health), nil
	case *instructions.ExposeCommand:
		return st.expose(c)
	case *instructions.UserCommand:
		st.config.User = c.User
		return "USER " + c.User, nil
	case *instructions.VolumeCommand:
		return st.volume(c)
	case *instructions.StopSignalCommand:
		if !validSignal(c.Signal) {
			return "", fmt.Errorf("invalid signal: %s", c.Signal)
		}
		st.config.StopSignal = c.Signal
		return "STOPSIGNAL " + c.Signal, nil
	case *instructions.ShellCommand:
		st.config.Shell = c.Shell
		return fmt.Sprintf("SHELL %v", c.Shell), nil
	case *instructions.OnbuildCommand:
		st.config.OnBuild = append(slices.Clone(st.config.OnBuild), c.Expression)
		st.held += len(st.config.OnBuild)
		return "", nil
	}
	return "", fmt.Errorf("unknown instruction: %s", cmd.Name())
}

const mapWeight = 4 // what an entry of a map takes, compared with one of a list

func (st *state) env(c *instructions.EnvCommand) string {
	text := "ENV"
	list, place := slices.Clone(st.config.Env), map[string]int{}
	for i := len(list) - 1; i >= 0; i-- {
		k, _, _ := strings.Cut(list[i], "=")
		place[k] = i
	}
	for _, kv := range c.Env {
		st.checkKeyValue(c, kv)
		checkSecretName("ENV", kv.Key, c.Location(), st.lint)
		text += " " + kv.String()
		st.vars.set(kv.Key, kv.Value)
		if i, ok := place[kv.Key]; ok {
			list[i] = kv.String()
			continue
		}
		place[kv.Key] = len(list)
		list = append(list, kv.String())
	}
	st.config.Env = list
	st.held += len(list)
	return text
}

func (st *state) label(c *instructions.LabelCommand) string {
	text := "LABEL"
	labels := maps.Clone(st.config.Labels)
	if labels == nil {
		labels = make(map[string]string, len(c.Labels))
	}
	for _, kv := range c.Labels {
		st.checkKeyValue(c, kv)
		text += " " + kv.String()
		labels[kv.Key] = kv.Value
	}
	st.config.Labels = labels
	st.held += mapWeight * len(labels)
	return text
}

// arg declares arguments; unlike elsewhere each sees those before it on the same line.
func (st *state) arg(c *instructions.ArgCommand, step *Step) error {
	text := "ARG"
	st.config.Args = slices.Clone(st.config.Args)
	for _, kv := range c.Args {
		checkSecretName("ARG", kv.Key, c.Location(), st.lint)
		value := kv.Value
		if given, ok := st.file.args.Build[kv.Key]; ok {
			value = &given
		} else if value == nil {
			if v, ok := st.file.global.Get(kv.Key); ok {
				value = &v
				step.inherited = append(step.inherited, kv.Key)
			}
		} else {
			v, err := st.expand(st.file.lex(), *value, c.Location())
			if err != nil {
				return err
			}
			value = &v
		}
		text += " " + kv.Key
		if value != nil {
			text += "=" + *value
			if exported(kv.Key) {
				st.vars.set(kv.Key, *value)
			}
		}
		if !slices.Contains(step.inherited, kv.Key) {
			step.args = append(step.args, argument(kv, c.Location(), value))
		}
		st.declare(kv.Key, value)
	}
	st.held += len(st.config.Args)
	step.History = text
	return nil
}

// declare adds an argument to those in scope; declared again without a value it keeps the one it has.
func (st *state) declare(name string, value *string) {
	i := slices.IndexFunc(st.config.Args, func(a Arg) bool { return a.Name == name })
	switch {
	case i < 0:
		st.config.Args = append(st.config.Args, Arg{name, value})
	case value != nil:
		st.config.Args[i].Value = value
	}
}

// exported says whether commands see an argument: those that steer the SBOM scanner are not for them.
func exported(arg string) bool {
	return arg != "BUILDKIT_SBOM_SCAN_CONTEXT" && arg != "BUILDKIT_SBOM_SCAN_STAGE"
}

func (st *state) cmd(c *instructions.CmdCommand) string {
	st.once(c.Name(), c.Location())
	st.config.Cmd = st.commandLine(c.ShellDependantCmdLine, c)
	//lint:ignore SA1019 it is part of the config that BuildKit writes
	st.config.ArgsEscaped = true
	return fmt.Sprintf("CMD %q", st.config.Cmd)
}

func (st *state) entrypoint(c *instructions.EntrypointCommand) string {
	st.once(c.Name(), c.Location())
	st.config.Entrypoint = st.commandLine(c.ShellDependantCmdLine, c)
	if _, ok := st.set["CMD"]; !ok {
		st.config.Cmd = nil // an inherited one was meant for the inherited entry point
	}
	return fmt.Sprintf("ENTRYPOINT %q", st.config.Entrypoint)
}

func (st *state) commandLine(line instructions.ShellDependantCmdLine, c instructions.Command) []string {
	if !line.PrependShell {
		return line.CmdLine
	}
	if len(st.config.Shell) == 0 {
		st.lint.Run(&linter.RuleJSONArgsRecommended, c.Location(), linter.RuleJSONArgsRecommended.Format(c.Name()))
	}
	return st.inShell(line.CmdLine)
}

// inShell wraps a shell-form command in SHELL.
func (st *state) inShell(words []string) []string {
	sh := []string{"/bin/sh", "-c"}
	if len(st.config.Shell) > 0 {
		sh = slices.Clone(st.config.Shell)
	}
	return append(sh, strings.Join(words, " "))
}

// once remembers that the stage sets something of which only the last one counts.
func (st *state) once(name string, where []parser.Range) {
	key := strings.ToUpper(name)
	if before, ok := st.set[key]; ok {
		msg := linter.RuleMultipleInstructionsDisallowed.Format(name)
		st.lint.Run(&linter.RuleMultipleInstructionsDisallowed, before, msg)
	}
	st.set[key] = where
}

func (st *state) volume(c *instructions.VolumeCommand) (string, error) {
	volumes := maps.Clone(st.config.Volumes)
	if volumes == nil {
		volumes = make(map[string]struct{}, len(c.Volumes))
	}
	for _, v := range c.Volumes {
		if v == "" {
			return "", errors.New("VOLUME specified can not be an empty string")
		}
		volumes[v] = struct{}{}
	}
	st.config.Volumes = volumes
	st.held += mapWeight * len(volumes)
	return fmt.Sprintf("VOLUME %v", c.Volumes), nil
}

func (st *state) workdir(c *instructions.WorkdirCommand, step *Step) {
	if !st.config.workdir && !path.IsAbs(c.Path) {
		st.lint.Run(&linter.RuleWorkdirRelativePath, c.Location(), linter.RuleWorkdirRelativePath.Format(c.Path))
	}
	st.config.workdir = true
	dir := joinDir(st.config.WorkingDir, c.Path)
	st.config.WorkingDir = dir
	step.History = "WORKDIR " + dir
	if dir == "/" {
		return
	}
	step.Text = st.title(st.file.lex(), c.String(), st.vars)
	step.Op = &Mkdir{Path: path.Clean(dir), User: st.config.User}
}

// joinDir returns where WORKDIR leads to. An absolute path is kept as written.
func joinDir(dir, p string) string {
	if p == "" {
		p = dir
	}
	if path.IsAbs(p) {
		return p
	}
	return path.Join("/", dir, p)
}

func (st *state) expose(c *instructions.ExposeCommand) (string, error) {
	var ports []string
	lex := st.file.lex()
	for _, p := range c.Ports {
		if _, err := lex.expand(p, st.vars); err != nil { // for its limits: ProcessWords has none
			return "", err
		}
		words, err := lex.ProcessWords(p, st.vars)
		if err != nil {
			return "", err
		}
		for _, w := range words {
			some, err := st.ports(w, c.Location())
			if err != nil {
				return "", err
			}
			if ports = append(ports, some...); len(ports) > 1<<18 {
				return "", errors.New("too many ports")
			}
		}
	}
	exposed := maps.Clone(st.config.ExposedPorts)
	if exposed == nil {
		exposed = make(map[string]struct{}, len(ports))
	}
	for _, p := range ports {
		exposed[p] = struct{}{}
	}
	st.config.ExposedPorts = exposed
	st.held += mapWeight * len(exposed)
	return fmt.Sprintf("EXPOSE %v", ports), nil
}

// ports returns the ports of [[ip:]host:]container[-end][/proto], which are "port/proto".
func (st *state) ports(text string, where []parser.Range) ([]string, error) {
	host, port := "", text
	if i := strings.LastIndex(text, ":"); i >= 0 {
		host, port = text[:i], text[i+1:]
		st.lint.Run(&linter.RuleExposeInvalidFormat, where, linter.RuleExposeInvalidFormat.Format(text))
	}
	port, proto, _ := strings.Cut(port, "/")
	if proto != strings.ToLower(proto) {
		st.lint.Run(&linter.RuleExposeProtoCasing, where, linter.RuleExposeProtoCasing.Format(text))
	}
	switch proto = strings.ToLower(proto); proto {
	case "":
		proto = "tcp"
	case "tcp", "udp", "sctp":
	default:
		return nil, fmt.Errorf("invalid port %q: unknown protocol %s", text, proto)
	}
	first, last, err := portRange(port)
	if err != nil {
		return nil, fmt.Errorf("invalid port %q: %w", text, err)
	}
	if err := checkHostPort(host, last-first); err != nil {
		return nil, fmt.Errorf("invalid port %q: %w", text, err)
	}
	var out []string
	for n := first; n <= last; n++ {
		out = append(out, strconv.Itoa(n)+"/"+proto)
	}
	return out, nil
}

// checkHostPort checks [ip:]host, which EXPOSE tolerates; size is one less than the number of container ports.
func checkHostPort(host string, size int) error {
	ip, port := "", host
	if i := strings.LastIndex(host, ":"); i >= 0 {
		ip, port = host[:i], host[i+1:]
	}
	if ip != "" {
		if _, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(ip, "["), "]")); err != nil {
			return fmt.Errorf("invalid IP address: %s", ip)
		}
	}
	if port == "" {
		return nil
	}
	first, last, err := portRange(port)
	if err != nil {
		return fmt.Errorf("host port: %w", err)
	}
	if size != 0 && last-first != size {
		return errors.New("the ranges of host and container differ in length")
	}
	return nil
}

func portRange(text string) (first, last int, err error) {
	if text == "" {
		return 0, 0, errors.New("no port")
	}
	start, end, isRange := strings.Cut(text, "-")
	if first, err = portNumber(start); err != nil || !isRange {
		return first, first, err
	}
	if last, err = portNumber(end); err != nil {
		return 0, 0, err
	}
	if last < first {
		return 0, 0, fmt.Errorf("the range %s runs backwards", text)
	}
	return first, last, nil
}

func portNumber(text string) (int, error) {
	n, err := strconv.Atoi(text)
	if err != nil {
		return 0, fmt.Errorf("%q is not a number", text)
	}
	if n < 0 || n > 65535 {
		return 0, fmt.Errorf("%d is not between 0 and 65535", n)
	}
	return n, nil
}

// signals are the names of Linux signals without SIG, in the order of their numbers where they have one name each.
var signals = strings.Fields(`HUP INT QUIT ILL TRAP ABRT IOT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM STKFLT CHLD CLD
	CONT STOP TSTP TTIN TTOU URG XCPU XFSZ VTALRM PROF WINCH IO POLL PWR SYS RTMIN RTMAX`)

// validSignal says whether text is the name of a signal of Linux or a number.
func validSignal(text string) bool {
	if n, err := strconv.Atoi(text); err == nil {
		return n != 0 // what other systems call by a number Linux lacks
	}
	name := strings.TrimPrefix(strings.ToUpper(text), "SIG")
	if n, ok := strings.CutPrefix(name, "RTMIN+"); ok {
		return realTime(n, 15)
	}
	if n, ok := strings.CutPrefix(name, "RTMAX-"); ok {
		return realTime(n, 14)
	}
	return slices.Contains(signals, name)
}

func realTime(text string, most int) bool {
	n, err := strconv.Atoi(text)
	return err == nil && n >= 1 && n <= most && strconv.Itoa(n) == text
}
