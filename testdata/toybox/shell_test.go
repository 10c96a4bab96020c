package main

import (
	"bytes"
	"os"
	"strings"
	"testing"
)

func TestShell(t *testing.T) {
	t.Setenv("PATH", "") // applets only
	t.Setenv("WHO", "me and you")
	tests := []struct {
		script, out, err string
		status           int
	}{
		{"echo hello", "hello\n", "", 0},
		{`echo "a  b" 'c $WHO' "$WHO" ${WHO}x \$WHO`, "a  b c $WHO me and you me and youx $WHO\n", "", 0},
		{"true && echo yes || echo no", "yes\n", "", 0},
		{"false && echo yes || echo no", "no\n", "", 0},
		{"echo a; echo b\necho c # d\n# e", "a\nb\nc\n", "", 0},
		{"false\necho $?", "1\n", "", 0},
		{"exit 7; echo no", "", "", 7},
		{"set -e; false; echo no", "", "", 1},
		{"set -e; false || true; echo yes", "yes\n", "", 0},
		{"echo a > f && echo b >> f && cat f && cat < f", "a\nb\na\nb\n", "", 0},
		{"echo x >&2", "", "x\n", 0},
		{"cat missing 2>&1", "toybox: open missing: no such file or directory\n", "", 1},
		{"cat missing 2> e; echo $?", "1\n", "", 0},
		{"true &&\n echo on", "on\n", "", 0},
		{"A=1; echo $A", "1\n", "", 0},
		{"echo $", "$\n", "", 0},
		{"nothere", "", "sh: nothere: not found\n", 127},
		{"echo a | cat", "", "sh: '|' is not supported\n", 2},
		{"echo $(pwd)", "", "sh: '$' is not supported\n", 2},
		{"echo 'open", "", "sh: unterminated quote\n", 2},
		{"&& echo", "", "sh: syntax error near \"&&\"\n", 2},
		{"mkdir -p d/e && touch d/e/f && cp -r d g && ls g/e && rm -r g && test -e g || echo gone", "f\ngone\n", "", 0},
		{"ln -s target l && test -L l && echo link", "link\n", "", 0},
		{"echo hi > h && sha256sum h", "98ea6e4f216f2fb4b69fff9b3a44842c38686ca685f3f55dc48c5d3fb1107be4  h\n", "", 0},
		{"seq 3", "1\n2\n3\n", "", 0},
	}
	for _, tt := range tests {
		t.Run(tt.script, func(t *testing.T) {
			t.Chdir(t.TempDir())
			var out, err bytes.Buffer
			status := sh([]string{"-c", tt.script}, stdio{strings.NewReader(""), &out, &err})
			if out.String() != tt.out || err.String() != tt.err || status != tt.status {
				t.Errorf("out %q, err %q, status %d; want %q, %q, %d", &out, &err, status, tt.out, tt.err, tt.status)
			}
		})
	}
}

func TestScriptFile(t *testing.T) {
	t.Chdir(t.TempDir())
	os.WriteFile("s", []byte("echo from file\nexit 3\n"), 0o666)
	var out bytes.Buffer
	if status := sh([]string{"s"}, stdio{strings.NewReader(""), &out, &out}); status != 3 || out.String() != "from file\n" {
		t.Errorf("status %d, out %q", status, &out)
	}
}

func TestInstall(t *testing.T) {
	dir := t.TempDir()
	for range 2 {
		if status := call([]string{"install", dir}, stdio{nil, os.Stdout, os.Stderr}); status != 0 {
			t.Fatalf("install: status %d", status)
		}
	}
	if to, err := os.Readlink(dir + "/sh"); to != "toybox" || err != nil {
		t.Errorf("sh is a link to %q, %v", to, err)
	}
}
