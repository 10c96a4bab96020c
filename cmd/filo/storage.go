package main

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"filo/builder/sandbox"
	"filo/layer"
)

// storing is how layers become one directory for a step, and why.
type storing struct {
	layer.Storage
	reason string
}

// useStorage decides how layers become one directory on a ground, and tells st: as --storage says, or by an overlay where
// one can be mounted, else by snapshots, else by a copy. What can be mounted is found out when somebody needs to know.
func (a *app) useStorage(g sandbox.Ground, st *layer.Store) (func() storing, error) {
	if layer.Storage(a.storage) == "auto" && mounts(g) {
		best := sync.OnceValue(func() storing { return bestStorage(st) })
		st.UseWhenNeeded(func() layer.Storage { return best().Storage })
		return best, nil
	}
	s, err := a.storageFor(g, st)
	if err != nil {
		return nil, err
	}
	return func() storing { return s }, st.Use(s.Storage)
}

func mounts(g sandbox.Ground) bool { return g.Name != "chroot" && g.Name != "none" }

// bestStorage is the storage where something can be mounted and nothing was asked for.
func bestStorage(st *layer.Store) storing {
	err := overlays(st)
	if err == nil {
		return storing{Storage: layer.StorageOverlay}
	}
	reason := "overlay: " + err.Error()
	best := layer.BestStorage(st.Dir())
	if err := st.Check(best); err != nil {
		return storing{layer.StorageVFS, reason + "; " + err.Error()}
	}
	return storing{best, reason}
}

// storageFor is the storage that was asked for, or the only one there is.
func (a *app) storageFor(g sandbox.Ground, st *layer.Store) (storing, error) {
	want := layer.Storage(a.storage)
	switch {
	case want == "auto":
		return storing{layer.StorageVFS, "nothing can be mounted"}, nil
	case want == layer.StorageOverlay && !mounts(g):
		return storing{}, fmt.Errorf("--storage overlay: nothing can be mounted here: %s", g.Reason)
	case want == layer.StorageOverlay:
		if err := overlays(st); err != nil {
			return storing{}, fmt.Errorf("--storage overlay: %w", err)
		}
	case want == layer.StorageBtrfs && !mounts(g):
		return storing{}, errors.New("--storage btrfs: nothing can be moved into a subvolume, and nothing can be mounted here; use vfs")
	case want != layer.StorageBtrfs && want != layer.StorageVFS:
		return storing{}, &usageError{"filo", fmt.Errorf("--storage %q: must be auto, overlay, btrfs or vfs", a.storage)}
	}
	return storing{want, "asked for"}, nil
}

// overlays reports why no overlay can be mounted with its upper directory in the store.
func overlays(st *layer.Store) error {
	dir, err := st.Temp("probe-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	return sandbox.Overlays(dir)
}

// String is for `filo info`.
func (s storing) String() string {
	if s.reason == "" {
		return string(s.Storage)
	}
	return fmt.Sprintf("%s (%s)", s.Storage, s.reason)
}
