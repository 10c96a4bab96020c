package sandbox

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// notExecutable says why there is nothing to run, with the code that a shell
// would give.
type notExecutable struct {
	text string
	code int
}

func (e *notExecutable) Error() string { return e.text }

// execute adds the calls that execute the program, and that say so before: a child that died in its set-up must not be
// taken for a process that failed.
func (q *sequence) execute(p Process) error {
	files, missing, err := lookPath(p.Args[0], p.Env)
	if err != nil {
		return err
	}
	q.add("start", unix.SYS_WRITE, reportFD, string(rune(starting)), 1)
	args, env := q.texts(p.Args), q.texts(p.Env)
	for _, file := range files {
		q.add("start", unix.SYS_EXECVE, file, args, env)
		q.blame(func(errno syscall.Errno) error { return cannotExecute(file, errno) })
		if missing != nil {
			q.tolerate(0, unix.EACCES) // not for this user; there may be another
		}
	}
	q.end = missing
	return nil
}

func cannotExecute(file string, err error) error {
	if !errors.Is(err, fs.ErrNotExist) {
		return &notExecutable{fmt.Sprintf("exec %s: %v", file, err), 126}
	}
	what := "" // the file is there: its interpreter is not
	if i := interpreter(file); i != "" {
		what = fmt.Sprintf(": interpreter %q", i)
	}
	return &notExecutable{fmt.Sprintf("exec %s%s: %v", file, what, err), 127}
}

// interpreter returns the program that the first line of a script names; "" if file is none or cannot be read.
func interpreter(file string) string {
	f, err := os.Open(file)
	if err != nil {
		return ""
	}
	defer f.Close()
	head := make([]byte, 256) // as much as the kernel looks at
	n, _ := io.ReadFull(f, head)
	line, _, _ := strings.Cut(string(head[:n]), "\n")
	text, script := strings.CutPrefix(line, "#!")
	if !script {
		return ""
	}
	name, _, _ := strings.Cut(strings.TrimLeft(text, " \t"), " ") // a \r at the end is part of the name
	return name
}

// lookPath finds a command as a shell does: all files that it may be, of which the user might not be allowed to execute
// some, and the error if that is so for all of them; nil if there is but one file.
func lookPath(name string, env []string) (files []string, missing, err error) {
	if strings.HasPrefix(name, "/proc/") {
		return []string{name}, nil, nil // which only the process has
	}
	if strings.Contains(name, "/") {
		err := executable(name)
		if err == nil {
			return []string{name}, nil, nil
		}
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
			return nil, nil, &notExecutable{fmt.Sprintf("exec: %q: stat %s: %v", name, name, err), 127}
		}
		return nil, nil, &notExecutable{fmt.Sprintf("exec: %q: %v", name, err), 126}
	}
	missing = &notExecutable{fmt.Sprintf("exec: %q: executable file not found in $PATH", name), 127}
	path := lookup(env, "PATH")
	if name == "" || path == "" {
		return nil, nil, missing
	}
	for _, dir := range strings.Split(path, ":") {
		if dir == "" {
			dir = "."
		}
		if file := dir + "/" + name; executable(file) == nil {
			files = append(files, file)
		}
	}
	if len(files) == 0 {
		return nil, nil, missing
	}
	return files, missing, nil
}

func executable(file string) error {
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return unix.EISDIR
	}
	return unix.Faccessat(unix.AT_FDCWD, file, unix.X_OK, unix.AT_EACCESS)
}

// lookup returns the last value of a variable, as the C library would not,
// but as every builder's environment means it.
func lookup(env []string, name string) (value string) {
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, name+"="); ok {
			value = v
		}
	}
	return value
}
