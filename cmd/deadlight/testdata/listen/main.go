// Command listen stands for the services of a host: it accepts on tcp/PORT, sends
// back what comes on echo/PORT, and answers on udp/PORT until it is killed.
package main

import (
	"io"
	"log"
	"net"
	"os"
	"strings"
)

func main() {
	for _, arg := range os.Args[1:] {
		network, port, _ := strings.Cut(arg, "/")
		if network == "udp" {
			c, err := net.ListenPacket("udp", ":"+port)
			if err != nil {
				log.Fatal(err)
			}
			go func() {
				b := make([]byte, 512)
				for {
					n, from, err := c.ReadFrom(b)
					if err == nil {
						_, err = c.WriteTo(b[:n], from)
					}
					if err != nil {
						log.Print(err)
					}
				}
			}()
			continue
		}
		l, err := net.Listen("tcp", ":"+port)
		if err != nil {
			log.Fatal(err)
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					log.Fatal(err)
				}
				if network == "echo" {
					go func() {
						_, _ = io.Copy(c, c) // until the other side, or the host, ends it
						c.Close()
					}()
					continue
				}
				c.Close()
			}
		}()
	}
	select {}
}
