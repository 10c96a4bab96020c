package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
)

// sh runs the text after -c, or a file. It knows lists of simple commands with && || ; and newlines, quotes, $NAME
// ${NAME} $? $$, NAME=VALUE, the redirections < > >> 2> 2>&1 and >&2, and # comments.
func sh(args []string, s stdio) int {
	stop := false
	for len(args) > 0 && len(args[0]) > 1 && args[0][0] == '-' && !strings.Contains(args[0], "c") {
		stop = stop || strings.Contains(args[0], "e")
		args = args[1:]
	}
	var text []byte
	var err error
	switch {
	case len(args) > 1 && strings.HasPrefix(args[0], "-"):
		stop = stop || strings.Contains(args[0], "e")
		text = []byte(args[1])
	case len(args) > 0:
		text, err = os.ReadFile(args[0])
	default:
		text, err = io.ReadAll(s.in)
	}
	if err != nil {
		fail(s, "sh", err)
		return 127
	}
	cmds, err := parse(string(text))
	if err != nil {
		fail(s, "sh", err)
		return 2
	}
	r := &runner{stdio: s, stop: stop}
	r.run(cmds)
	return r.status
}

// command is a simple command and how it is joined to the one before it.
type command struct {
	join   string // "", "&&" or "||"
	words  []word
	redirs []redir
}

// word is the pieces of a word; a piece that is not literal is expanded.
type word []piece

type piece struct {
	text    string
	literal bool // stood in single quotes or behind a backslash
}

type redir struct {
	op  string // "<", ">", ">>", "2>", "2>>"
	to  word
	dup bool // to names a descriptor: 2>&1, >&2
}

// parse cuts a script into commands.
func parse(text string) ([]command, error) {
	var cmds []command
	p := &scanner{text: text}
	cur := command{}
	end := func(join string) error {
		if len(cur.words)+len(cur.redirs) > 0 {
			cmds = append(cmds, cur)
		} else if join != "" || cur.join != "" {
			return fmt.Errorf("syntax error near %q", join)
		}
		cur = command{join: join}
		return nil
	}
	for {
		op, w, err := p.next()
		switch {
		case err == io.EOF:
			return cmds, end("")
		case err != nil:
			return nil, err
		case op == "\n" && cur.join != "" && len(cur.words) == 0: // a list goes on after && and ||
		case op == ";" || op == "\n":
			err = end("")
		case op == "&&" || op == "||":
			err = end(op)
		case op != "":
			r := redir{op: strings.TrimSuffix(op, "&"), dup: strings.HasSuffix(op, "&")}
			next, to, e := p.next()
			if e != nil || next != "" {
				return nil, fmt.Errorf("syntax error after %q", op)
			}
			r.to = to
			cur.redirs = append(cur.redirs, r)
		default:
			cur.words = append(cur.words, w)
		}
		if err != nil {
			return nil, err
		}
	}
}

// scanner finds operators and words.
type scanner struct {
	text string
	pos  int
}

// operators, longest first.
var operators = []string{"2>>", "2>&", "&&", "||", ">>", ">&", "2>", ";", "\n", "<", ">"}

func (p *scanner) next() (op string, w word, err error) {
	for p.pos < len(p.text) && (p.text[p.pos] == ' ' || p.text[p.pos] == '\t') {
		p.pos++
	}
	rest := p.text[p.pos:]
	if rest == "" {
		return "", nil, io.EOF
	}
	if rest[0] == '#' {
		if p.pos += strings.IndexByte(rest+"\n", '\n'); p.pos >= len(p.text) {
			return "", nil, io.EOF
		}
		return p.next()
	}
	for _, o := range operators {
		if strings.HasPrefix(rest, o) {
			p.pos += len(o)
			return o, nil, nil
		}
	}
	w, err = p.word()
	return "", w, err
}

// word reads up to a blank or an operator.
func (p *scanner) word() (word, error) {
	w := word{}
	add := func(s string, literal bool) { w = append(w, piece{s, literal}) }
	for p.pos < len(p.text) {
		c := p.text[p.pos]
		switch {
		case strings.IndexByte(" \t\n;<>", c) >= 0, strings.HasPrefix(p.text[p.pos:], "&&"), strings.HasPrefix(p.text[p.pos:], "||"):
			return w, nil
		case strings.IndexByte("|&()`*?[", c) >= 0, strings.HasPrefix(p.text[p.pos:], "$("):
			if c != '[' && c != '?' || len(w) > 0 {
				return nil, fmt.Errorf("%q is not supported", c)
			}
			add(string(c), true)
			p.pos++
		case c == '\'':
			n := strings.IndexByte(p.text[p.pos+1:], '\'')
			if n < 0 {
				return nil, errors.New("unterminated quote")
			}
			add(p.text[p.pos+1:p.pos+1+n], true)
			p.pos += n + 2
		case c == '"':
			if err := p.quoted(add); err != nil {
				return nil, err
			}
		case c == '\\' && p.pos+1 < len(p.text):
			if p.text[p.pos+1] != '\n' {
				add(p.text[p.pos+1:p.pos+2], true)
			}
			p.pos += 2
		case c == '$':
			add(p.dollar(), false)
		default:
			add(string(c), true)
			p.pos++
		}
	}
	return w, nil
}

// quoted reads what is between double quotes.
func (p *scanner) quoted(add func(string, bool)) error {
	add("", true)
	for p.pos++; p.pos < len(p.text); {
		switch c := p.text[p.pos]; {
		case c == '"':
			p.pos++
			return nil
		case c == '\\' && p.pos+1 < len(p.text) && strings.IndexByte("\"\\$`", p.text[p.pos+1]) >= 0:
			add(p.text[p.pos+1:p.pos+2], true)
			p.pos += 2
		case c == '$':
			add(p.dollar(), false)
		case c == '`':
			return fmt.Errorf("%q is not supported", c)
		default:
			add(string(c), true)
			p.pos++
		}
	}
	return errors.New("unterminated quote")
}

// dollar reads a variable and returns its name, "$" if it is a lone dollar.
func (p *scanner) dollar() string {
	p.pos++
	rest := p.text[p.pos:]
	if strings.HasPrefix(rest, "{") {
		if n := strings.IndexByte(rest, '}'); n > 0 {
			p.pos += n + 1
			return rest[1:n]
		}
	}
	n := 0
	for n < len(rest) && (rest[n] == '_' || rest[n]|0x20 >= 'a' && rest[n]|0x20 <= 'z' || n > 0 && rest[n] >= '0' && rest[n] <= '9') {
		n++
	}
	if n == 0 && len(rest) > 0 && (rest[0] == '?' || rest[0] == '$') {
		n = 1
	}
	if n == 0 {
		return "" // a dollar that begins nothing
	}
	p.pos += n
	return rest[:n]
}

// runner runs commands one after another.
type runner struct {
	stdio
	status int
	stop   bool // set -e
	exited bool
}

func (r *runner) run(cmds []command) {
	for i, c := range cmds {
		switch {
		case c.join == "&&" && r.status != 0, c.join == "||" && r.status == 0:
			continue
		}
		r.status = r.simple(c)
		last := i+1 == len(cmds) || cmds[i+1].join == ""
		if r.exited || r.stop && last && r.status != 0 {
			return
		}
	}
}

// simple runs one command.
func (r *runner) simple(c command) int {
	s, closeAll, err := r.redirect(c.redirs)
	defer closeAll()
	if err != nil {
		return fail(r.stdio, "sh", err)
	}
	var args []string
	for _, w := range c.words {
		text := r.expand(w)
		if text != "" || quoted(w) {
			args = append(args, text)
		}
	}
	var env []string
	for len(args) > 0 && isAssignment(args[0]) {
		env, args = append(env, args[0]), args[1:]
	}
	if len(args) == 0 {
		for _, e := range env {
			k, v, _ := strings.Cut(e, "=")
			os.Setenv(k, v)
		}
		return 0
	}
	if status, ok := r.builtin(args, s); ok {
		return status
	}
	return execute(args, env, s)
}

// builtin runs what must happen in the shell itself.
func (r *runner) builtin(args []string, s stdio) (int, bool) {
	switch args[0] {
	case ":":
		return 0, true
	case "cd":
		dir := os.Getenv("HOME")
		if len(args) > 1 {
			dir = args[1]
		}
		if err := os.Chdir(dir); err != nil {
			return fail(s, "cd", err), true
		}
		return 0, true
	case "export":
		for _, e := range args[1:] {
			if k, v, ok := strings.Cut(e, "="); ok {
				os.Setenv(k, v)
			}
		}
		return 0, true
	case "set":
		for _, o := range args[1:] {
			r.stop = r.stop || strings.HasPrefix(o, "-") && strings.Contains(o, "e")
		}
		return 0, true
	case "exit":
		r.exited = true
		if len(args) > 1 {
			n, _ := strconv.Atoi(args[1])
			return n & 0xff, true
		}
		return r.status, true
	}
	return 0, false
}

// execute runs a program of the PATH, or an applet if there is none of that name.
func execute(args, env []string, s stdio) int {
	path, err := exec.LookPath(args[0])
	if err != nil {
		if _, ok := applets()[args[0]]; ok && len(env) == 0 && !strings.Contains(args[0], "/") {
			return call(args, s)
		}
		fmt.Fprintf(s.err, "sh: %s: not found\n", args[0])
		return 127
	}
	cmd := exec.Command(path, args[1:]...)
	cmd.Args[0] = args[0]
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = s.in, s.out, s.err
	err = cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			return 128 + int(ws.Signal())
		}
		return exit.ExitCode()
	}
	fmt.Fprintf(s.err, "sh: %v\n", err)
	return 126
}

func (r *runner) expand(w word) string {
	var b strings.Builder
	for _, p := range w {
		switch {
		case p.literal:
			b.WriteString(p.text)
		case p.text == "":
			b.WriteByte('$')
		case p.text == "?":
			fmt.Fprint(&b, r.status)
		case p.text == "$":
			fmt.Fprint(&b, os.Getpid())
		default:
			b.WriteString(os.Getenv(p.text))
		}
	}
	return b.String()
}

// quoted reports whether a word stands even if it is empty.
func quoted(w word) bool {
	for _, p := range w {
		if p.literal {
			return true
		}
	}
	return false
}

func isAssignment(s string) bool {
	k, _, ok := strings.Cut(s, "=")
	return ok && k != "" && strings.Trim(strings.ToLower(k), "abcdefghijklmnopqrstuvwxyz_0123456789") == "" && (k[0] < '0' || k[0] > '9')
}

// redirect opens what a command's redirections name.
func (r *runner) redirect(redirs []redir) (stdio, func(), error) {
	s := r.stdio
	var open []*os.File
	closeAll := func() {
		for _, f := range open {
			f.Close()
		}
	}
	for _, d := range redirs {
		to := r.expand(d.to)
		if d.dup {
			switch {
			case d.op == "2>" && to == "1":
				s.err = s.out
			case d.op == ">" && to == "2":
				s.out = s.err
			default:
				return s, closeAll, fmt.Errorf("%s&%s is not supported", d.op, to)
			}
			continue
		}
		flags := map[string]int{"<": os.O_RDONLY, ">": os.O_WRONLY | os.O_CREATE | os.O_TRUNC, ">>": os.O_WRONLY | os.O_CREATE | os.O_APPEND}
		f, err := os.OpenFile(to, flags[strings.TrimPrefix(d.op, "2")], 0o666)
		if err != nil {
			return s, closeAll, err
		}
		open = append(open, f)
		switch d.op {
		case "<":
			s.in = f
		case ">", ">>":
			s.out = f
		default:
			s.err = f
		}
	}
	return s, closeAll, nil
}
