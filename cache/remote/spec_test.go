package remote

import (
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for _, test := range []struct {
		role, value string
		want        string // type and text of each, or the beginning of an error
	}{
		{"from", "h.example/me/app:cache", "registry h.example/me/app:cache"},
		{"from", "a,b:1", "registry a, registry b:1"},
		{"from", "type=registry,ref=a", "registry a"},
		{"from", "type=local,src=d", "local d"},
		{"from", "type=s3,bucket=b,name=x;y", "s3 b"},
		{"from", "type=inline", "unknown cache importer"},
		{"from", "type=local", "type=local: dest is required"},
		{"from", "type=registry", "type=registry: ref is required"},
		{"from", "ref=a", "type is required"},
		{"to", "type=ftp", "unknown cache exporter: \"ftp\""},
		{"to", "type=inline", "inline inline"},
		{"to", "type=inline,mode=max", "unknown attribute"},
		{"to", "type=registry,ref=a,mode=max,compression=zstd,compression-level=3,force-compression=true,ignore-error=true,image-manifest=true,oci-mediatypes=true,registry.insecure=true,max-age=30d,max-records=5", "registry a"},
		{"from", "type=registry,ref=a,cache-mounts=true,cache-mounts-max=500MB", "registry a"},
		{"to", "type=s3,bucket=b,cache-mounts=true", "s3 b"},
		{"to", "type=local,dest=d,cache-mounts=perhaps", "cache-mounts=perhaps: must be"},
		{"to", "type=local,dest=d,cache-mounts-max=-1", "cache-mounts-max=-1: must be a size"},
		{"to", "type=inline,cache-mounts=true", "unknown attribute"},
		{"to", "type=registry,ref=a,mode=mid", "mode=mid: must be min or max"},
		{"to", "type=registry,ref=a,mod=max", "unknown attribute \"mod\""},
		{"to", "type=registry,ref=a,oci-mediatypes=false,image-manifest=true", "oci-mediatypes=false needs"},
		{"to", "type=registry,ref=a,oci-mediatypes=false", "registry a"},
		{"to", "type=registry,ref=a,compression=brotli", "compression"},
		{"to", "type=registry,ref=a,ignore-error=maybe", "ignore-error=maybe: must be"},
		{"to", "type=registry,ref=a,max-age=never", "max-age=never: not a time span"},
		{"to", "type=registry,ref=a,max-age=-5h", "max-age=-5h: not a time span"},
		{"to", "type=s3,bucket=b,name=x;y", "s3 b, s3 b"},
		{"to", "type=s3,bucket=b,touch_refresh=1h,upload_parallelism=0", "upload_parallelism=0"},
		{"to", "type=s3", "type=s3: bucket is required"},
		{"to", "type=local,dest=d,=x", "\"=x\" is not KEY=VALUE"},
		{"to", "\"type=local", "\"\\\"type=local\""},
	} {
		parse := ParseFrom
		if test.role == "to" {
			parse = ParseTo
		}
		specs, err := parse(test.value)
		var got []string
		for _, s := range specs {
			got = append(got, s.Type+" "+s.Text)
		}
		text := strings.Join(got, ", ")
		if err != nil {
			text = err.Error()
		}
		if text != test.want && (err == nil || !strings.HasPrefix(text, test.want)) {
			t.Errorf("--cache-%s %s: %q, want %q", test.role, test.value, text, test.want)
		}
	}
}
