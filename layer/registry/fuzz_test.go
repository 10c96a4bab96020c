package registry

import (
	"os"
	"path/filepath"
	"testing"
)

// FuzzConfig reads what somebody wrote as a configuration of registries, and names what it is asked for.
func FuzzConfig(f *testing.F) {
	for _, seed := range []string{
		"[[registry]]\nprefix = \"a.example/x\"\nlocation = \"b.example/y\"\n[[registry.mirror]]\nlocation = \"c.example\"\ninsecure = true\n",
		"[registry.\"docker.io\"]\nmirrors = [\"m.example:5000/p\"]\nhttp = true\nca = [\"/x\"]\n",
		"server = \"https://s.example\"\n[host.\"http://h.example/v2\"]\ncapabilities = [\"pull\", \"resolve\"]\nskip_verify = true\n",
		"unqualified-search-registries = [\"x\"]\n", "[", "",
	} {
		f.Add([]byte(seed), "a.example/x/y:1")
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, text []byte, ref string) {
		path := filepath.Join(dir, "registries.conf")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		full, err := Normalize(ref)
		if err == nil {
			if again, err := Normalize(full); err != nil || again != full {
				t.Errorf("Normalize(%q) = %q, and of that %q, %v", ref, full, again, err)
			}
		}
		c, err := ReadConfig(path)
		if err != nil {
			return
		}
		Open(Options{Config: c})
	})
}
