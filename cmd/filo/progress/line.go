package progress

import (
	"bytes"
	"fmt"
	"time"
)

// line is one line of a step's output.
type line struct {
	at      time.Time // when it began
	seconds string    // since the step's start; "" for the builder's own words
	text    []byte    // without the newline
}

func (l line) String() string {
	if l.seconds == "" {
		return string(l.text)
	}
	return l.seconds + " " + string(l.text)
}

// partial is the beginning of a line whose end has not come yet.
type partial struct {
	text []byte
	at   time.Time
}

// lineLimit bounds what is kept of a line without end, such as binary output; a longer one is drawn in pieces.
const lineLimit = 64 << 10

// take cuts data of one stream into lines; what has no end yet is kept.
func (v *vertex) take(stream int, data []byte, now time.Time) []line {
	p := &v.streams[min(max(stream, 0), 2)]
	var lines []line
	for len(data) > 0 {
		if len(p.text) == 0 {
			p.at = now
		}
		head, rest, ended := bytes.Cut(data, []byte{'\n'})
		if room := lineLimit - len(p.text); len(head) > room {
			head, rest, ended = data[:room], data[room:], true
		}
		p.text = append(p.text, head...)
		data = rest
		if ended {
			lines = append(lines, v.line(stream, p))
		}
	}
	return lines
}

// flush ends the lines that the step left without an end.
func (v *vertex) flush() []line {
	var lines []line
	for stream := range v.streams {
		if p := &v.streams[stream]; len(p.text) > 0 {
			lines = append(lines, v.line(stream, p))
		}
	}
	return lines
}

// line empties p into a line and remembers it in the tail.
func (v *vertex) line(stream int, p *partial) line {
	l := line{at: p.at, text: bytes.TrimSuffix(p.text, []byte{'\r'})}
	if stream != 0 {
		l.seconds = seconds(p.at.Sub(v.started))
	}
	p.text = nil
	if stream != 0 {
		if len(v.tail) == tailLines {
			v.tail = append(v.tail[:0:0], v.tail[1:]...)
		}
		v.tail = append(v.tail, l.String())
	}
	return l
}

// seconds formats the time since a step's start as BuildKit does: four digits as long as they last.
func seconds(d time.Duration) string {
	s := d.Seconds()
	switch {
	case s < 10:
		return fmt.Sprintf("%.3f", s)
	case s < 100:
		return fmt.Sprintf("%.2f", s)
	}
	return fmt.Sprintf("%.1f", s)
}
