package builder

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
)

// slowInspection ends when it is told to.
type slowInspection struct {
	end chan struct{}
	err error
}

func (s *slowInspection) Wait(ctx context.Context) error {
	select {
	case <-s.end:
		return s.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s *slowInspection) Passed() bool {
	select {
	case <-s.end:
		return s.err == nil
	default:
		return false
	}
}

func TestTrial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := newTrial(t.Context())
		var mu sync.Mutex
		var kept []int
		keep := func(i int) {
			tr.then(func(verdict error) {
				mu.Lock()
				defer mu.Unlock()
				if verdict != nil {
					t.Errorf("%d: %v", i, verdict)
				}
				kept = append(kept, i)
			})
			synctest.Wait()
		}
		expect := func(want ...int) {
			t.Helper()
			if !slices.Equal(kept, want) {
				t.Fatalf("kept %v, want %v", kept, want)
			}
		}
		keep(1)
		expect(1)
		first, second := &slowInspection{end: make(chan struct{})}, &slowInspection{end: make(chan struct{})}
		tr.await(first)
		keep(2)
		tr.await(second)
		keep(3)
		close(second.end) // but first goes on
		synctest.Wait()
		expect(1)
		close(first.end)
		synctest.Wait()
		if len(kept) != 3 {
			t.Fatalf("kept %v when all was over", kept)
		}
		tr.await(first) // over
		keep(4)
		if kept[3] != 4 {
			t.Errorf("kept %v", kept)
		}
		if err := tr.end(); err != nil || tr.ctx.Err() != nil {
			t.Error(err, tr.ctx.Err())
		}
	})
}

func TestTrialFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := newTrial(t.Context())
		bad := errors.New("damaged")
		good := &slowInspection{end: make(chan struct{})}
		worse := &slowInspection{end: make(chan struct{}), err: bad}
		tr.await(worse)
		var verdicts []error
		tr.then(func(verdict error) { verdicts = append(verdicts, verdict) })
		tr.await(good)
		close(worse.end)
		synctest.Wait()
		if context.Cause(tr.ctx) != bad {
			t.Errorf("the build goes on: %v", tr.ctx.Err())
		}
		if err := tr.verdict(); err != bad {
			t.Errorf("verdict is %v", err)
		}
		tr.then(func(verdict error) { verdicts = append(verdicts, verdict) })
		if err := tr.end(); err != bad || !slices.Equal(verdicts, []error{bad, bad}) {
			t.Error(err, verdicts)
		}
	})
}
