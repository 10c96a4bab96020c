package dockerfile

import (
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/moby/buildkit/frontend/dockerfile/command"
)

// The parser picks its suggestion from maps: of two names equally near it takes one by chance. Errors must not depend
// on chance, so such a suggestion is made again here; two letters swapped count as one mistake, not two.

var suggestion = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`(unknown flag: --|unknown instruction: |unsupported mount type "|unsupported sharing value ")([^\s"=]*)(.*) \(did you mean (\S+)\?\)`)
})

var flagsOf = [][]string{
	{"checksum", "chmod", "chown", "exclude", "keep-git-dir", "link", "unpack"}, // ADD
	{"chmod", "chown", "exclude", "from", "link", "parents"},                    // COPY
	{"platform"}, // FROM
	{"interval", "retries", "start-interval", "start-period", "timeout"}, // HEALTHCHECK
	{"device", "mount", "network", "security"},                           // RUN
}

// reworded is an error with another text.
type reworded struct {
	error
	text string
}

func (e *reworded) Error() string { return e.text }
func (e *reworded) Unwrap() error { return e.error }

// settle makes a suggestion of the parser independent of chance.
func settle(err error) error {
	text := err.Error()
	m := suggestion().FindStringSubmatchIndex(text)
	if m == nil {
		return err
	}
	wrong, given := text[m[4]:m[5]], text[m[8]:m[9]]
	best := nearest(strings.ToLower(wrong), candidates(text[m[2]:m[3]], given))
	if best == "" {
		return &reworded{err, text[:m[7]] + text[m[1]:]}
	}
	if wrong == strings.ToUpper(wrong) {
		best = strings.ToUpper(best)
	}
	return &reworded{err, text[:m[8]] + best + text[m[9]:]}
}

// candidates are the names of the kind that a suggestion was made from.
func candidates(kind, given string) []string {
	var out []string
	switch {
	case strings.HasPrefix(kind, "unknown flag"):
		for _, flags := range flagsOf {
			if slices.Contains(flags, given) {
				out = append(out, flags...)
			}
		}
	case strings.HasPrefix(kind, "unknown instruction"):
		out = sortedKeys(command.Commands)
	case strings.HasPrefix(kind, "unsupported mount"):
		out = []string{string(MountBind), string(MountCache), string(MountSecret), string(MountSSH), string(MountTmpfs)}
	default:
		out = []string{"locked", "private", "shared"}
	}
	return out
}

// nearest returns the option with the fewest mistakes, at most two, the first of several; "" for none.
func nearest(text string, options []string) string {
	best, least := "", 3
	for _, o := range options {
		if d := mistakes(text, o); d < least {
			best, least = o, d
		}
	}
	return best
}

// mistakes counts letters missing, added, changed, or swapped with their neighbour.
func mistakes(was, meant string) int {
	a, b := []rune(was), []rune(meant)
	if len(a) > len(b)+2 || len(b) > len(a)+2 {
		return 3
	}
	d := make([][]int, len(a)+1)
	for i := range d {
		d[i] = make([]int, len(b)+1)
		d[i][0] = i
	}
	for j := range d[0] {
		d[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			change := d[i-1][j-1]
			if a[i-1] != b[j-1] {
				change++
			}
			d[i][j] = min(d[i-1][j]+1, d[i][j-1]+1, change)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				d[i][j] = min(d[i][j], d[i-2][j-2]+1)
			}
		}
	}
	return d[len(a)][len(b)]
}
