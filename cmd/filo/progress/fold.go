package progress

import (
	"fmt"
	"strings"
	"time"
)

// Fold is how a CI system is told which lines it may fold: those of a step, under its name. How the step ended stays in view.
type Fold string

// The CI systems that are known.
const (
	NoFold Fold = ""       // any other: it is told nothing
	GitHub Fold = "github" // groups of workflow commands, which do not nest
	GitLab Fold = "gitlab" // collapsible sections, which are shown with how long they took
)

// begin is what stands before the line with the name of v.
func (f Fold) begin(v *vertex, now time.Time) string {
	switch f {
	case GitHub:
		return "::group::"
	case GitLab:
		return fmt.Sprintf("\x1b[0Ksection_start:%d:%s[collapsed=true]\r\x1b[0K", now.Unix(), v.section())
	}
	return ""
}

// title is the name of a step as it has to be written behind begin.
func (f Fold) title(name string) string {
	if f == GitHub { // takes %0A for a new line, and so on
		return strings.ReplaceAll(name, "%", "%25")
	}
	return name
}

// end is what stands behind the lines of v.
func (f Fold) end(v *vertex, now time.Time) string {
	switch f {
	case GitHub:
		return "::endgroup::\n"
	case GitLab:
		return fmt.Sprintf("\x1b[0Ksection_end:%d:%s\r\x1b[0K\n", now.Unix(), v.section())
	}
	return ""
}

// section names v among all that a job draws, which may have several builds.
func (v *vertex) section() string { return fmt.Sprintf("filo_%d_%d", v.n, v.started.UnixNano()) }
