package progress

import (
	"bytes"
	"fmt"
	"io"
	"time"

	"filo/builder"
)

// plain draws blocks of lines. One vertex has the floor; what others say waits until it ends, or until it had the
// floor long enough, and then comes under a header of its own.
type plain struct {
	w       io.Writer
	text    bytes.Buffer // what is to be written next
	now     func() time.Time
	timed   bool // each line begins with its time
	fold    Fold
	waiting []*block // has something to say, in the order of asking
	blocks  map[*vertex]*block
	floor   *vertex
	since   time.Time // when floor got it
	started bool      // something was drawn
}

// block is what a vertex has to say.
type block struct {
	v    *vertex
	at   time.Time // of the first
	text bytes.Buffer
	end  bytes.Buffer // how v ended
}

const (
	patience   = 5 * time.Second // how long others wait for the vertex that has the floor
	blockLimit = 1 << 20         // and how much is kept of what they say meanwhile
)

func (p *plain) event(v *vertex, e builder.Event, lines []line) {
	b, now := p.block(v), p.now()
	for _, l := range lines {
		p.put(&b.text, v, l.at, l.String())
	}
	switch e.State {
	case builder.Warned:
		p.put(&b.text, v, now, "WARN: "+string(e.Data))
	case builder.Cached:
		p.put(&b.end, v, now, "CACHED")
	case builder.Done:
		p.put(&b.end, v, now, fmt.Sprintf("DONE %.1fs", v.ended.Sub(v.started).Seconds()))
	case builder.Failed:
		p.put(&b.end, v, now, fmt.Sprintf("ERROR: %v", e.Err))
	case builder.Canceled:
		p.put(&b.end, v, now, "CANCELED")
	case builder.Moving, builder.Moved:
		p.move(b, v.moving(string(e.Data)))
	case builder.Started, builder.Log:
	}
	p.speak(b)
	p.flush()
}

// timeForm is how the time of a line is written, in UTC.
const timeForm = "2006-01-02T15:04:05.000Z "

// put writes a line about v to w.
func (p *plain) put(w *bytes.Buffer, v *vertex, at time.Time, text string) {
	if p.timed {
		w.Write(at.UTC().AppendFormat(nil, timeForm))
	}
	fmt.Fprintf(w, "#%d %s\n", v.n, text)
}

// move writes what moves when it has come, and now and then while that takes long.
func (p *plain) move(b *block, m *move) {
	now := p.now()
	end := ""
	if !m.end.IsZero() {
		end = " done"
	} else if now.Sub(m.drawn) < patience {
		return
	}
	m.drawn = now
	p.put(&b.text, b.v, now, fmt.Sprintf("%s %s %.1fs%s", m.what, m.count(), m.took(now).Seconds(), end))
}

func (p *plain) tick() {
	if p.floor == nil || p.now().Sub(p.since) >= patience {
		p.next()
	}
	p.flush()
}

func (p *plain) close() {
	for len(p.waiting) > 0 {
		p.next()
	}
	if p.floor != nil {
		p.text.WriteString(p.fold.end(p.floor, p.now()))
	}
	p.flush()
}

// flush writes what was drawn, at once.
func (p *plain) flush() {
	if p.text.Len() > 0 {
		p.w.Write(p.text.Bytes())
		p.text.Reset()
	}
}

// block returns v's block, which waits to be drawn from now on.
func (p *plain) block(v *vertex) *block {
	if p.blocks == nil {
		p.blocks = map[*vertex]*block{}
	}
	b := p.blocks[v]
	if b == nil {
		b = &block{v: v, at: p.now()}
		p.blocks[v] = b
		p.waiting = append(p.waiting, b)
	}
	return b
}

// speak draws b if it may speak now.
func (p *plain) speak(b *block) {
	switch {
	case p.floor == nil, p.floor == b.v, !b.v.running(), b.text.Len() > blockLimit:
		p.draw(b)
	case p.now().Sub(p.since) >= patience:
		p.next()
	}
	if p.floor == nil {
		p.next()
	}
}

// next gives the floor to the vertex that waits longest.
func (p *plain) next() {
	if len(p.waiting) > 0 {
		p.draw(p.waiting[0])
	}
}

// draw takes all of b and gives its vertex the floor for as long as it runs.
func (p *plain) draw(b *block) {
	if p.floor != b.v {
		now := p.now()
		if p.floor != nil {
			p.put(&p.text, p.floor, now, "...")
			p.text.WriteString(p.fold.end(p.floor, now))
		}
		if p.started {
			p.text.WriteByte('\n')
		}
		p.started = true
		p.text.WriteString(p.fold.begin(b.v, now))
		p.put(&p.text, b.v, b.at, p.fold.title(b.v.name))
		p.floor, p.since = b.v, now
	}
	p.text.Write(b.text.Bytes())
	delete(p.blocks, b.v)
	for i, w := range p.waiting {
		if w == b {
			p.waiting = append(p.waiting[:i:i], p.waiting[i+1:]...)
			break
		}
	}
	if !b.v.running() {
		p.text.WriteString(p.fold.end(b.v, p.now()))
		p.text.Write(b.end.Bytes())
		p.floor = nil
	}
}
