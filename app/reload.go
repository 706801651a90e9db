//go:build linux

package app

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/cli"
	"leasehold/config"
	"leasehold/election"
	"leasehold/internal/quote"
	"leasehold/supervisor/guard"
	"leasehold/supervisor/ipc"
	"leasehold/supervisor/reload"
)

// askReload is the command reload.
func askReload(c cli.Call) error {
	pid, err := strconv.ParseUint(c.Args[0], 10, 31)
	if err != nil || pid == 0 {
		return &cli.UsageError{Hint: quote.Value(c.Args[0]) + " is no pid: " + c.Command.Usage()}
	}
	request := reload.Request{PID: int(pid)}
	if c.HasJob {
		request.Command = append([]string{}, c.Job...)
	}
	if c.Has("--env") {
		request.Settings = slices.DeleteFunc(os.Environ(), notOurs)
	}
	version, err := reload.Ask(request)
	refused := (*reload.RefusedError)(nil)
	if err != nil && !errors.As(err, &refused) && !errors.Is(err, reload.ErrNoAnswer) {
		err = fmt.Errorf("%w: %w", errSystem, err)
	}
	if err != nil {
		return fmt.Errorf("reload: %w", err)
	}
	fmt.Printf("reloaded: leasehold %s\n", version)
	return nil
}

// notOurs reports whether an entry of the environment is none of our settings.
func notOurs(entry string) bool { return !strings.HasPrefix(entry, config.Prefix+"_") }

// reloadConfig is what the guard needs for a reload. environ is the environment as it was at the
// start, before the env file was added.
func reloadConfig(
	build Build, cfg config.Config, environ []string, envFile string,
) guard.ReloadConfig {
	path, err := ownPath()
	if err == nil && envFile != "" {
		envFile, err = filepath.Abs(envFile)
	}
	if err != nil {
		return guard.ReloadConfig{Version: build.Version}
	}
	fixed := cfg.Fixed()
	return guard.ReloadConfig{
		Path: path, Version: build.Version, Env: environ,
		Check: func(lease, created int64, settings bool) []string {
			return append([]string{
				"leasehold", roleCheckReload, strconv.Itoa(ipc.RecordVersion),
				strconv.Itoa(os.Getpid()), envFile, strconv.FormatBool(settings),
				strconv.FormatInt(lease, 16), strconv.FormatInt(created, 10),
			}, fixed...)
		},
	}
}

// ownPath is where this binary was started from. It may be a symbolic link, which names another
// binary after an upgrade.
func ownPath() (string, error) {
	exe, err := os.Stat("/proc/self/exe")
	if err != nil {
		return "", err
	}
	named, err := exec.LookPath(os.Args[0])
	if err == nil {
		named, err = filepath.Abs(named)
	}
	if err == nil {
		if st, err := os.Stat(named); err == nil && os.SameFile(st, exe) {
			return named, nil
		}
	}
	return os.Executable()
}

const (
	// verifyTime bounds how long etcd is asked, and checkTime the whole check: the guard ends it a
	// little earlier, unless it hangs itself.
	verifyTime = 10 * time.Second
	checkTime  = 16 * time.Second
)

// checkReload checks whether an elector of this binary, with the settings as they are now, can
// take over from the one of a guard. The guard runs it, which may be of another binary, with the
// environment of its own start. The result goes to descriptor 3.
func checkReload(build Build, args []string) int {
	nameProcess(roleCheckReload)
	result := os.NewFile(3, "result")
	r := reload.Result{Version: build.Version}
	err := hideMemory()
	if err == nil {
		err = endWithGuard(args)
	}
	if err == nil {
		err = canTakeOver(args)
	}
	if err != nil {
		r.Refused = quote.Line(strings.Join(strings.Split(err.Error(), "\n"), "; "))
	}
	r.Env = os.Environ()
	if _, err := result.Write(r.Encode()); err != nil {
		fmt.Fprintln(os.Stderr, "leasehold: check a reload:", err)
		return exitInternal
	}
	return exitOK
}

// endWithGuard ends this process with the guard, and after a while. The guard has asked the kernel
// for the former, but the kernel forgets that if the binary has capabilities of its own.
func endWithGuard(args []string) error {
	go func() {
		time.Sleep(checkTime)
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
	}()
	runtime.LockOSThread() // the signal goes with the thread that asks for it
	err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0)
	if err == nil && len(args) > 1 && args[1] != strconv.Itoa(os.Getppid()) {
		err = errors.New("the daemon has exited")
	}
	return err
}

// canTakeOver returns why there can be no reload, or nil. It makes the environment that of an
// elector.
func canTakeOver(args []string) error {
	if version := args[0]; version != strconv.Itoa(ipc.RecordVersion) {
		return fmt.Errorf("the daemon speaks version %s of the protocol between its processes,"+
			" and the new binary version %d: restart the daemon", version, ipc.RecordVersion)
	}
	if len(args) < 6 {
		return fmt.Errorf("the daemon has passed %d arguments", len(args))
	}
	envFile, asked, fixed := args[2], args[3] == "true", args[6:]
	lease, err := strconv.ParseInt(args[4], 16, 64)
	if err != nil {
		return err
	}
	created, err := strconv.ParseInt(args[5], 10, 64)
	if err != nil {
		return err
	}
	if asked {
		if err := takeSettings(); err != nil {
			return fmt.Errorf("take the settings from whoever asks: %w", err)
		}
	}
	if info, err := os.Stat(envFile); err == nil && !info.Mode().IsRegular() {
		return fmt.Errorf("%s can't be read again: it is no regular file", envFile)
	}
	if err := config.LoadFile(envFile); err != nil {
		return err
	}
	cfg, err := config.Load(config.ForRun)
	if err != nil {
		return err
	}
	if err := cfg.CompareFixed(fixed); err != nil {
		return err
	}
	if err := lookChecks(cfg); err != nil {
		return err
	}
	if lease == 0 {
		return nil
	}
	log := newLog(cfg)
	defer log.flush()
	ctx, cancel := context.WithTimeout(context.Background(), verifyTime)
	defer cancel()
	return election.Verify(ctx, cfg.ElectionConfig(log.Logger), lease, created)
}

// takeSettings puts the settings of whoever asks in the place of the guard's own.
func takeSettings() error {
	settings, err := reload.ReadSettings(4)
	if err != nil {
		return err
	}
	for _, entry := range os.Environ() {
		if name, _, _ := strings.Cut(entry, "="); !notOurs(entry) {
			if err := os.Unsetenv(name); err != nil {
				return err
			}
		}
	}
	for _, entry := range settings {
		if notOurs(entry) {
			continue
		}
		name, value, _ := strings.Cut(entry, "=")
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	return nil
}
