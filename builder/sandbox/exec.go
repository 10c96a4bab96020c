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

// execute becomes the process.
func execute(p Process) error {
	file, err := lookPath(p.Args[0], p.Env)
	if err != nil {
		return err
	}
	syscall.Write(reportFD, []byte{starting})
	err = syscall.Exec(file, p.Args, p.Env)
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

// lookPath finds a command as a shell does, with the user's own rights.
func lookPath(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		err := executable(name)
		if err == nil {
			return name, nil
		}
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
			return "", &notExecutable{fmt.Sprintf("exec: %q: stat %s: %v", name, name, err), 127}
		}
		return "", &notExecutable{fmt.Sprintf("exec: %q: %v", name, err), 126}
	}
	missing := &notExecutable{fmt.Sprintf("exec: %q: executable file not found in $PATH", name), 127}
	path := lookup(env, "PATH")
	if name == "" || path == "" {
		return "", missing
	}
	for _, dir := range strings.Split(path, ":") {
		if dir == "" {
			dir = "."
		}
		file := dir + "/" + name
		if executable(file) == nil {
			return file, nil
		}
	}
	return "", missing
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
