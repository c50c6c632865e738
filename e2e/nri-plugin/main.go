// An NRI plugin for the tests, made with the stock stub: it writes a line for every event, and does what its file says.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"google.golang.org/protobuf/encoding/protojson"
)

// behaviour is read anew at every event.
type behaviour struct {
	// Adjust is a ContainerAdjustment for the containers whose name is in Only (all when empty).
	Adjust json.RawMessage `json:"adjust"`
	Only   []string        `json:"only"`
	// Update is a ContainerUpdate given as the answer to UpdateContainer, for the container itself.
	Update json.RawMessage `json:"update"`
	// Unasked is a list of ContainerUpdates sent when the next container starts.
	Unasked []json.RawMessage `json:"unasked"`
	// Refuse and Hang name events.
	Refuse []string `json:"refuse"`
	Hang   []string `json:"hang"`
	// Reject is a validator's reason.
	Reject string `json:"reject"`
	// Events is the mask to subscribe with; 0 for all that this plugin has.
	Events int32 `json:"events"`
}

type plugin struct {
	sync.Mutex
	stub stub.Stub
	log  *os.File
	file string
}

func (p *plugin) behaviour() behaviour {
	var b behaviour
	if text, err := os.ReadFile(p.file); err == nil {
		if err := json.Unmarshal(text, &b); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
	return b
}

func (p *plugin) line(format string, a ...any) {
	p.Lock()
	defer p.Unlock()
	fmt.Fprintf(p.log, format+"\n", a...)
}

// at notes an event and does what is asked of every event.
func (p *plugin) at(event string, pod *api.PodSandbox, c *api.Container) error {
	p.line("%s pod=%s/%s id=%s container=%s state=%s", event, pod.GetNamespace(), pod.GetName(), pod.GetId(), c.GetName(), c.GetState())
	b := p.behaviour()
	if slices.Contains(b.Hang, event) {
		time.Sleep(time.Minute)
	}
	if slices.Contains(b.Refuse, event) {
		return fmt.Errorf("%s is refused by the test", event)
	}
	return nil
}

func (p *plugin) Configure(_ context.Context, config, runtime, version string) (api.EventMask, error) {
	p.line("Configure config=%q runtime=%s version=%s", config, runtime, version)
	return api.EventMask(p.behaviour().Events), nil
}

func (p *plugin) Synchronize(_ context.Context, pods []*api.PodSandbox, containers []*api.Container) ([]*api.ContainerUpdate, error) {
	p.line("Synchronize pods=%d containers=%d", len(pods), len(containers))
	for _, c := range containers {
		p.line("known container=%s state=%s args=%q", c.GetName(), c.GetState(), c.GetArgs())
	}
	return nil, nil
}

func (p *plugin) Shutdown(context.Context) {}

func (p *plugin) RunPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.at("RunPodSandbox", pod, nil)
}

func (p *plugin) UpdatePodSandbox(_ context.Context, pod *api.PodSandbox, _, asked *api.LinuxResources) error {
	p.line("asked shares=%d", asked.GetCpu().GetShares().GetValue())
	return p.at("UpdatePodSandbox", pod, nil)
}

func (p *plugin) PostUpdatePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	p.line("now shares=%d", pod.GetLinux().GetPodResources().GetCpu().GetShares().GetValue())
	return p.at("PostUpdatePodSandbox", pod, nil)
}

func (p *plugin) StopPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.at("StopPodSandbox", pod, nil)
}

func (p *plugin) RemovePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.at("RemovePodSandbox", pod, nil)
}

func (p *plugin) CreateContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	if err := p.at("CreateContainer", pod, c); err != nil {
		return nil, nil, err
	}
	b := p.behaviour()
	if len(b.Adjust) == 0 || len(b.Only) > 0 && !slices.Contains(b.Only, c.GetName()) {
		return nil, nil, nil
	}
	adjust := &api.ContainerAdjustment{}
	if err := protojson.Unmarshal(b.Adjust, adjust); err != nil {
		return nil, nil, err
	}
	return adjust, nil, nil
}

func (p *plugin) PostCreateContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) error {
	return p.at("PostCreateContainer", pod, c)
}

func (p *plugin) StartContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) error {
	return p.at("StartContainer", pod, c)
}

func (p *plugin) PostStartContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) error {
	for _, text := range p.behaviour().Unasked {
		update := &api.ContainerUpdate{}
		if err := protojson.Unmarshal(text, update); err != nil {
			return err
		}
		if update.ContainerId == "" {
			update.ContainerId = c.GetId()
		}
		// Not from within the event: the runtime may be waiting for us.
		go func() {
			failed, err := p.stub.UpdateContainers([]*api.ContainerUpdate{update})
			p.line("unasked failed=%d error=%v", len(failed), err)
		}()
	}
	return p.at("PostStartContainer", pod, c)
}

func (p *plugin) UpdateContainer(_ context.Context, pod *api.PodSandbox, c *api.Container, r *api.LinuxResources) ([]*api.ContainerUpdate, error) {
	if err := p.at("UpdateContainer", pod, c); err != nil {
		return nil, err
	}
	p.line("asked shares=%d memory=%d", r.GetCpu().GetShares().GetValue(), r.GetMemory().GetLimit().GetValue())
	b := p.behaviour()
	if len(b.Update) == 0 {
		return nil, nil
	}
	update := &api.ContainerUpdate{}
	if err := protojson.Unmarshal(b.Update, update); err != nil {
		return nil, err
	}
	update.ContainerId = c.GetId()
	return []*api.ContainerUpdate{update}, nil
}

func (p *plugin) PostUpdateContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) error {
	return p.at("PostUpdateContainer", pod, c)
}

func (p *plugin) StopContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) ([]*api.ContainerUpdate, error) {
	return nil, p.at("StopContainer", pod, c)
}

func (p *plugin) RemoveContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) error {
	return p.at("RemoveContainer", pod, c)
}

func (p *plugin) ValidateContainerAdjustment(_ context.Context, req *api.ValidateContainerAdjustmentRequest) error {
	p.line("Validate container=%s plugins=%d", req.GetContainer().GetName(), len(req.GetPlugins()))
	if reason := p.behaviour().Reject; reason != "" {
		return fmt.Errorf("%s", reason)
	}
	return nil
}

func main() {
	folder := os.Getenv("NRI_TEST_DIR")
	socket := flag.String("socket", "", "the runtime's socket; as a started plugin, the runtime says")
	name := flag.String("name", "", "the plugin's name")
	index := flag.String("index", "", "its index")
	dir := flag.String("dir", folder, "where its behaviour is read and its log written")
	flag.Parse()
	if *dir == "" {
		// A started plugin has no arguments and no environment but the runtime's.
		exe, _ := os.Executable()
		*dir = exe + ".d"
	}
	log, err := os.OpenFile(*dir+"/log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		panic(err)
	}
	p := &plugin{log: log, file: *dir + "/behaviour.json"}
	var options []stub.Option
	if *socket != "" {
		options = append(options, stub.WithSocketPath(*socket), stub.WithPluginName(*name), stub.WithPluginIdx(*index))
	}
	options = append(options, stub.WithOnClose(func() { p.line("closed"); os.Exit(0) }))
	if p.stub, err = stub.New(p, options...); err != nil {
		panic(err)
	}
	if err := p.stub.Run(context.Background()); err != nil {
		p.line("ended: %v", err)
		os.Exit(1)
	}
}
