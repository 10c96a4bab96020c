package progress

import (
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/opencontainers/go-digest"

	"filo/builder"
)

// raw writes each event as one JSON object, in the shape of BuildKit's SolveStatus.
type raw struct {
	w   io.Writer
	now func() time.Time
}

type solveStatus struct {
	Vertexes []rawVertex  `json:"vertexes,omitempty"`
	Statuses []rawStatus  `json:"statuses,omitempty"`
	Logs     []rawLog     `json:"logs,omitempty"`
	Warnings []rawWarning `json:"warnings,omitempty"`
}

type rawVertex struct {
	Digest    digest.Digest `json:"digest"`
	Name      string        `json:"name"`
	Started   *time.Time    `json:"started,omitempty"`
	Completed *time.Time    `json:"completed,omitempty"`
	Cached    bool          `json:"cached,omitempty"`
	Error     string        `json:"error,omitempty"`
}

type rawStatus struct {
	ID        string        `json:"id"`
	Vertex    digest.Digest `json:"vertex"`
	Total     int64         `json:"total,omitempty"`
	Current   int64         `json:"current"`
	Timestamp time.Time     `json:"timestamp"`
	Started   *time.Time    `json:"started,omitempty"`
	Completed *time.Time    `json:"completed,omitempty"`
}

type rawLog struct {
	Vertex    digest.Digest `json:"vertex"`
	Stream    int           `json:"stream"`
	Data      []byte        `json:"data"`
	Timestamp time.Time     `json:"timestamp"`
}

type rawWarning struct {
	Vertex digest.Digest `json:"vertex"`
	Level  int           `json:"level"`
	Short  []byte        `json:"short"`
}

// errCanceled is what BuildKit reports for a vertex that was stopped because another failed.
const errCanceled = "context canceled"

func (r *raw) event(v *vertex, e builder.Event, lines []line) {
	id := v.digest()
	now := r.now()
	var s solveStatus
	switch e.State {
	case builder.Log:
		s = r.log(id, e, lines, now)
	case builder.Moving, builder.Moved:
		m := v.moving(string(e.Data))
		st := rawStatus{ID: m.what, Vertex: id, Total: m.of, Current: m.bytes, Timestamp: now, Started: &m.begin}
		if !m.end.IsZero() {
			st.Completed = &m.end
		}
		s.Statuses = []rawStatus{st}
	case builder.Warned:
		s.Warnings = []rawWarning{{Vertex: id, Level: 1, Short: e.Data}}
	case builder.Started, builder.Cached, builder.Done, builder.Failed, builder.Canceled:
		s.Vertexes = []rawVertex{r.vertex(id, v)}
		if e.State == builder.Started { // what was before
			for _, p := range v.spans {
				s.Statuses = append(s.Statuses, phaseStatus(id, p))
			}
		}
	}
	if len(s.Vertexes)+len(s.Statuses)+len(s.Logs)+len(s.Warnings) == 0 {
		return
	}
	json.NewEncoder(r.w).Encode(s)
}

func (r *raw) vertex(id digest.Digest, v *vertex) rawVertex {
	out := rawVertex{Digest: id, Name: v.name, Started: &v.started, Cached: v.state == builder.Cached}
	if !v.running() {
		out.Completed = &v.ended
	}
	if v.err != nil {
		out.Error = v.err.Error()
	}
	if v.state == builder.Canceled {
		out.Error = errCanceled
	}
	return out
}

// digest names v. Vertices have no content digest here; the number and the name make one that is unique within the
// build.
func (v *vertex) digest() digest.Digest { return digest.FromString(fmt.Sprintf("%d %s", v.n, v.name)) }

// phase writes a phase as a status.
func (r *raw) phase(v *vertex, s span) {
	json.NewEncoder(r.w).Encode(solveStatus{Statuses: []rawStatus{phaseStatus(v.digest(), s)}})
}

func phaseStatus(id digest.Digest, s span) rawStatus {
	return rawStatus{ID: s.phase, Vertex: id, Timestamp: s.end, Started: &s.begin, Completed: &s.end}
}

// log passes output on as it came; the builder's own words become statuses.
func (r *raw) log(id digest.Digest, e builder.Event, lines []line, now time.Time) (s solveStatus) {
	if e.Stream != 0 {
		s.Logs = []rawLog{{Vertex: id, Stream: e.Stream, Data: e.Data, Timestamp: now}}
		return s
	}
	for _, l := range lines {
		if l.seconds == "" {
			s.Statuses = append(s.Statuses, rawStatus{ID: string(l.text), Vertex: id, Timestamp: now, Started: &now, Completed: &now})
		}
	}
	return s
}

func (r *raw) tick()  {}
func (r *raw) close() {}
