package progress

import (
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/tonistiigi/vt100"

	"filo/builder"
)

// tty draws all steps as a list, over and over on the same place. A running step shows the last lines of its log as
// a small terminal of its own would.
type tty struct {
	w        io.Writer
	d        *Display
	size     func() (width, height int)
	now      func() time.Time
	color    bool
	logLines int
	terms    map[*vertex]*vt100.VT100
	words    map[*vertex][]string // what the builder itself said about a step
	warnings map[*vertex][]string
	begin    time.Time
	drawn    time.Time
	height   int // lines drawn last time
}

const (
	ttyLogLines = 6
	ttyName     = 7 + 12                 // of what moves: sha256: and enough of a digest to leave room for the count
	ttyMargin   = 10                     // columns that the log window leaves free, as BuildKit's
	ttyRest     = 100 * time.Millisecond // between two drawings
)

// The colours of the list: those of buildx.
const (
	blue   = "\x1b[34m"
	red    = "\x1b[31m"
	yellow = "\x1b[33m"
	faint  = "\x1b[2m"
	reset  = "\x1b[0m"
)

func newTTY(w io.Writer, d *Display, o Options) *tty {
	t := &tty{w: w, d: d, size: o.Size, now: o.Now, color: o.Color, logLines: o.LogLines, begin: o.Now()}
	if t.logLines <= 0 {
		t.logLines = ttyLogLines
	}
	t.terms, t.words, t.warnings = map[*vertex]*vt100.VT100{}, map[*vertex][]string{}, map[*vertex][]string{}
	return t
}

func (t *tty) event(v *vertex, e builder.Event, lines []line) {
	switch e.State {
	case builder.Log:
		if e.Stream == 0 {
			for _, l := range lines {
				t.words[v] = append(t.words[v], string(l.text))
			}
			break
		}
		t.window(v).Write(newlines(e.Data)) // an unknown escape sequence is an error; it is skipped
	case builder.Warned:
		t.warnings[v] = append(t.warnings[v], string(e.Data))
	case builder.Cached, builder.Done, builder.Failed, builder.Canceled:
		delete(t.terms, v)
	case builder.Started, builder.Moving, builder.Moved:
	}
	if t.now().Sub(t.drawn) >= ttyRest {
		t.draw(false)
	}
}

func (t *tty) tick()  { t.draw(false) }
func (t *tty) close() { t.draw(true) }

// newlines adds the carriage returns that a terminal's line discipline would.
func newlines(b []byte) []byte {
	return []byte(strings.ReplaceAll(string(b), "\n", "\r\n"))
}

// window returns the small terminal of a running step.
func (t *tty) window(v *vertex) *vt100.VT100 {
	if t.terms[v] == nil {
		width, height := t.size()
		t.terms[v] = vt100.NewVT100(max(min(t.logLines, height), 1), max(width-ttyMargin, 1))
	}
	return t.terms[v]
}

// row is a line of the list.
type row struct {
	text, timer string
	style       string // an escape sequence; "" for none
	done        bool   // of a step that has ended
}

// draw writes the list over the last one. The last drawing has all rows, whatever the height of the terminal.
func (t *tty) draw(last bool) {
	t.drawn = t.now()
	width, height := t.size()
	ended := 0
	for _, v := range t.d.order {
		if !v.running() {
			ended++
		}
	}
	rows := t.rows()
	if !last {
		rows = fit(rows, height-2)
	}
	var b strings.Builder
	if t.height > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", t.height)
	}
	b.WriteString("\r\x1b[J\x1b[?25l\x1b[?7l") // from here to the end is erased; no cursor, no wrapping of wide characters
	head := fmt.Sprintf("[+] Building %.1fs (%d/%d)", t.now().Sub(t.begin).Seconds(), ended, len(t.d.order))
	if last && ended == len(t.d.order) {
		head += " FINISHED"
	}
	b.WriteString(clip(head, width) + "\n")
	for _, r := range rows {
		b.WriteString(t.paint(r, width) + "\n")
	}
	b.WriteString("\x1b[?7h\x1b[?25h")
	io.WriteString(t.w, b.String())
	t.height = len(rows) + 1
}

// rows are the lines below the head.
func (t *tty) rows() []row {
	var rows []row
	for _, v := range t.d.order {
		r := row{text: " => " + v.name, done: !v.running(), timer: timer(t.elapsed(v))}
		switch {
		case v.running():
		case v.state == builder.Cached:
			r.text, r.style = " => CACHED "+v.name, blue
		case v.state == builder.Failed:
			r.text, r.style = " => ERROR "+v.name, red
		case v.state == builder.Canceled:
			r.text, r.style = " => CANCELED "+v.name, yellow
		default:
			r.style = blue
		}
		rows = append(rows, r)
		for _, w := range t.words[v] {
			rows = append(rows, row{text: " => => " + w, style: r.style, done: r.done})
		}
		for _, m := range v.moves {
			rows = append(rows, row{text: " => => " + clip(m.what, ttyName) + " " + m.count(), timer: timer(m.took(t.now())), style: r.style, done: r.done || !m.end.IsZero()})
		}
		for _, w := range t.warnings[v] {
			rows = append(rows, row{text: " => WARN: " + w, style: yellow, done: r.done})
		}
		rows = append(rows, t.log(v)...)
	}
	return rows
}

// log is the window of a running step, without its empty lines.
func (t *tty) log(v *vertex) []row {
	term := t.terms[v]
	if term == nil {
		return nil
	}
	var rows []row
	for _, l := range term.Content {
		if text := strings.TrimRight(string(l), " "); text != "" {
			rows = append(rows, row{text: " => => # " + text, style: faint})
		}
	}
	return rows
}

func (t *tty) elapsed(v *vertex) time.Duration {
	if v.running() {
		return t.now().Sub(v.started)
	}
	return v.ended.Sub(v.started)
}

func timer(d time.Duration) string { return fmt.Sprintf(" %.1fs", d.Seconds()) }

// fit drops rows until they fit: first those of steps that have ended, oldest first, then the oldest.
func fit(rows []row, height int) []row {
	height = max(height, 1)
	excess := len(rows) - height
	if excess <= 0 {
		return rows
	}
	kept := make([]row, 0, height)
	for _, r := range rows {
		if r.done && excess > 0 {
			excess--
			continue
		}
		kept = append(kept, r)
	}
	return kept[max(excess, 0):]
}

// paint lays r out on one line of the terminal.
func (t *tty) paint(r row, width int) string {
	room := width - len(r.timer) - 1
	text := clip(strings.Map(visible, r.text), max(room, 1))
	if r.timer != "" {
		text += strings.Repeat(" ", max(room-utf8.RuneCountInString(text), 0)) + r.timer
	}
	if !t.color || r.style == "" {
		return text
	}
	return r.style + text + reset
}

// visible keeps a name from moving the cursor.
func visible(r rune) rune {
	if r < ' ' || r == 0x7f {
		return ' '
	}
	return r
}

// clip cuts s to n columns, counting a rune as one.
func clip(s string, n int) string {
	if utf8.RuneCountInString(s) <= n {
		return s
	}
	return string([]rune(s)[:n])
}
