package dockerfile

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
)

var errEpochStage = errors.New("a stage for SOURCE_DATE_EPOCH must be FROM scratch with a single ADD of one URL")

// readEpoch finds out what SOURCE_DATE_EPOCH says: a number, or where the time comes from.
func (f *File) readEpoch() error {
	value, ok := f.args.Build[epochArg]
	if !ok {
		value, _ = f.global.Get(epochArg)
	}
	if value == "" {
		return nil
	}
	if n, err := strconv.ParseInt(value, 10, 64); err == nil {
		f.Epoch = &n
		return nil
	}
	if value == "context" {
		f.EpochFrom = &Ref{}
		return nil
	}
	if c, ok := f.context(value, nil); ok {
		f.EpochFrom = &Ref{Name: c}
		return nil
	}
	for _, s := range f.Stages {
		if s.Name == "" || !strings.EqualFold(s.Name, value) {
			continue
		}
		if err := s.epochSource(); err != nil {
			return s.Locate(err)
		}
		f.EpochFrom = &Ref{Stage: s}
		return nil
	}
	return fmt.Errorf("invalid SOURCE_DATE_EPOCH: %s", value)
}

// epochSource checks that a stage is nothing but a download.
func (s *Stage) epochSource() error {
	if s.Base.Name != scratch {
		return errEpochStage
	}
	adds := 0
	for _, n := range s.nodes {
		cmd, err := parseNode(n, s.file.quiet())
		if err != nil {
			return err
		}
		switch c := cmd.(type) {
		case *instructions.ArgCommand:
		case *instructions.AddCommand:
			if len(c.SourcePaths) != 1 || len(c.SourceContents) > 0 {
				return errEpochStage
			}
			adds++
		default:
			return errEpochStage
		}
	}
	if adds != 1 {
		return errEpochStage
	}
	steps, err := s.Steps(Config{}, s.file.args.TargetPlatform)
	if err != nil {
		return err
	}
	if op, ok := steps[len(steps)-1].Op.(*Copy); !ok || op.Sources[0].URL == "" {
		return errEpochStage
	}
	return nil
}
