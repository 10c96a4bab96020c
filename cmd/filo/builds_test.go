package main

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"filo/layer"
)

// TestKeptBuilds keeps one record more than there may be: the one that was written first goes, whatever it is called and
// whether or not it can be read.
func TestKeptBuilds(t *testing.T) {
	store, err := layer.Open(t.TempDir(), layer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	s := &state{store: store}
	if err := os.Mkdir(s.builds(), 0o755); err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-time.Hour)
	for i := range keptBuilds + 2 {
		name := filepath.Join(s.builds(), fmt.Sprintf("%03d.json", 999-i))
		if err := os.WriteFile(name, []byte("torn"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(name, time.Time{}, old.Add(time.Duration(i)*time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.keep(buildRecord{ID: "0"}); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(s.builds() + "/*")
	if err != nil || len(left) != keptBuilds {
		t.Errorf("%d records are left, %v, want %d", len(left), err, keptBuilds)
	}
	for i := range keptBuilds + 2 {
		name := fmt.Sprintf("%03d.json", 999-i)
		if _, err := os.Stat(filepath.Join(s.builds(), name)); (err == nil) != (i > 2) {
			t.Errorf("record %d of %d: %v", i, keptBuilds+2, err)
		}
	}
	if all, err := s.readBuilds(); err != nil || len(all) != 1 || all[0].ID != "0" {
		t.Errorf("readBuilds = %v, %v, want the one that was kept last", all, err)
	}
}
