package dockerfile

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// FuzzSteps runs the whole pure pass over foreign text: it must not crash, hang or depend on anything but its input.
func FuzzSteps(f *testing.F) {
	for _, seed := range stepSeeds {
		f.Add(seed, "COPY --from=a /x /y")
	}
	files, _ := filepath.Glob(conformance + "/*/*/Dockerfile")
	for _, name := range files {
		if text, err := os.ReadFile(name); err == nil {
			f.Add(string(text), "RUN --mount=from=a,target=/m true")
		}
	}
	f.Fuzz(func(t *testing.T, text, trigger string) {
		first, err := pureDump(text, trigger)
		second, err2 := pureDump(text, trigger)
		if fmt.Sprint(err) != fmt.Sprint(err2) {
			t.Fatalf("two errors for one text:\n%v\n%v", err, err2)
		}
		if one, two := mustJSON(t, first), mustJSON(t, second); !bytes.Equal(one, two) {
			t.Fatalf("two results for one text:\n%s\n%s", one, two)
		}
		var e *Error
		if err != nil && !errors.As(err, &e) {
			t.Fatalf("error without a place: %T %v", err, err)
		}
		if e != nil && len(e.Ranges) > 0 && e.Excerpt() == "" {
			t.Fatalf("no excerpt for %v of %q: %v", e.Ranges, text, e)
		}
	})
}

// pureDump returns all steps and warnings of a text.
func pureDump(text, trigger string) (steps [][]Step, err error) {
	args, _ := goldenArgs([]string{"--build-arg", "A=1", "--build-arg", "http_proxy=p", "--build-context", "ctx=."})
	args.Ignore = []string{"*.md", "d/x"}
	f, err := Parse(strings.NewReader(text), args)
	if err != nil {
		return nil, err
	}
	if _, err := f.Plan(""); err != nil {
		return nil, err
	}
	var c Config
	c.Env, c.OnBuild, c.WorkingDir = []string{"PATH=/bin", "E=e"}, []string{trigger}, "/w"
	_, err = f.Check(f.Stages, args.TargetPlatform, func(*Stage) (Config, error) { return c, nil })
	if err != nil {
		return nil, err
	}
	err = f.Walk(f.Stages, args.TargetPlatform, func(*Stage) (Config, error) { return c, nil }, func(_ *Stage, s []Step) error {
		steps = append(steps, s)
		return nil
	})
	if err != nil {
		return nil, err
	}
	_, err = f.Outline(f.Stages, args.TargetPlatform, func(*Stage) (Config, error) { return c, nil })
	return steps, err
}

var stepSeeds = []string{
	"FROM a AS a\nFROM a\nRUN echo $A\n",
	"ARG V=1\nFROM x:${V#1}${A:+b} AS b\nARG V\nENV A=$V B=${V//1/2} C=\"$A\" D='x'\nLABEL $A=b c=d\n",
	"FROM scratch\nCOPY <<A <<\"B\" --chmod=u=rwX /d/\n$X\nA\n$Y\nB\nADD --checksum=sha256:0 http://h/x /y\n",
	"# syntax=x\n# escape=`\n# check=skip=all;error=true\nFROM x\nRUN a `\n b\nRUN <<E cat\nx\nE\nRUN <<-E\n\t#!/bin/x\n\tE\n",
	"FROM x\nRUN --mount=type=cache,target=c,uid=1 --mount=type=secret,id=q,env=Q --mount=type=ssh --network=none true\n",
	"FROM x\nONBUILD COPY --from=a /x /y\nSHELL [\"a\"]\nCMD b\nENTRYPOINT [\"c\"]\nHEALTHCHECK --interval=1s CMD x\n",
	"FROM x\nEXPOSE 1-3/UDP 127.0.0.1:1:2 [::1]:5:6\nVOLUME [\"/a\"] /b\nUSER $U\nWORKDIR a/../b\nSTOPSIGNAL SIGRTMIN+3\nMAINTAINER m\n",
	"FROM a\nENV A=aaaaaaaaaaaaaaaa\nENV A=${A//a/$A}\nENV A=${A//a/$A}\nENV A=${A//a/${A//a/$A}}\n",
	"FROM --platform=$BUILDPLATFORM a AS x\nCOPY --from=0 --parents --exclude=a ./a/./b* .. /c/\n",
	"FROM a\nCOPY --from=b / /\nFROM a AS b\nCOPY --from=0 / /\n",
}
